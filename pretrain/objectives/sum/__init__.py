"""The weighted sum of several objectives over one encoder."""
