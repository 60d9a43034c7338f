"""SigLIP: the sigmoid loss for image-text pairs (Zhai et al. 2023, arXiv:2303.15343)."""
