"""SimCLR: contrast of two views against all others of the batch (Chen et al. 2020, arXiv:2002.05709)."""
