"""Nearest class mean: the class whose mean of training features is nearest."""
