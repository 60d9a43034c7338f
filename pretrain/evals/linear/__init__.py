"""The linear probe: logistic regression on frozen features, chosen on a split of the training set."""
