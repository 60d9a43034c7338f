"""What is in a data set and whether it is sound: verification of every byte, and statistics."""
