"""Tars, the index beside each, and the manifest of a data set: read strictly, scanned, and written atomically.

What a sample's bytes mean is not known here; see samples/.
"""
