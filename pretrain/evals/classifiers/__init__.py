"""Linear classifiers on frozen features, fitted side by side by gradient descent or to the optimum."""
