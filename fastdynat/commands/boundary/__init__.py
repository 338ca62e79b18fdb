"""`fastdynat boundary`: a chart of the speed of the decision boundary over the margin."""
