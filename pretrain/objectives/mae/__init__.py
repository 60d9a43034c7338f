"""MAE: masked autoencoders (He et al. 2021, arXiv:2111.06377)."""
