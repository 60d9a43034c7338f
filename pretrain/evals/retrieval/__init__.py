"""Retrieval: images by captions and captions by images."""
