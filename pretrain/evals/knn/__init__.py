"""kNN: the label of a test image by the weighted votes of its nearest training images."""
