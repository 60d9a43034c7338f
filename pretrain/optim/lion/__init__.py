"""Lion: steps by the sign of an average of the gradient (Chen et al. 2023, arXiv:2302.06675)."""
