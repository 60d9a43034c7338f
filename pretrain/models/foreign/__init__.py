"""Weights files of other programs: what is in one that cannot be loaded safely, and what of it is an encoder's."""
