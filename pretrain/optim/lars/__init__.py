"""LARS (You et al. 2017, arXiv:1708.03888)."""
