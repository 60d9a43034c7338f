"""From the bytes of a sample to what a batch holds: pixels, views, the parameters of color draws, captions."""
