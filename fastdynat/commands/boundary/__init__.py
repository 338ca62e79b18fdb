"""`fastdynat boundary`: the speed of the decision boundary over the margin, as a chart."""
