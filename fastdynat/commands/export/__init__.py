"""`fastdynat export`: the network of a run for RobustBench, torch.export or ONNX, checked when written."""
