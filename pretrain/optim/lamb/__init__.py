"""LAMB (You et al. 2019, arXiv:1904.00962)."""
