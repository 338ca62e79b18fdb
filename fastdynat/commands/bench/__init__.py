"""`fastdynat bench`: the speed of attack and training step, against peers, switches and a baseline."""
