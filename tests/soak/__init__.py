"""Long runs that are watched: whether anything grows, and whether a run that is killed again and again ends alike."""
