"""Features of a frozen encoder over whole data sets: what is read from it, computed once, kept on disk, searched."""
