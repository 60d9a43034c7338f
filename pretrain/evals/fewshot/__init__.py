"""Few-shot classification: a simple classifier on a few labels of each class."""
