"""SimSiam (Chen and He 2020, arXiv:2011.10566)."""
