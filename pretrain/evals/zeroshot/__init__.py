"""Zero-shot classification: each class is a text."""
