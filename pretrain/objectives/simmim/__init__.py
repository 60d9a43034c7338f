"""SimMIM: masked image modeling (Xie et al. 2021, arXiv:2111.09886)."""
