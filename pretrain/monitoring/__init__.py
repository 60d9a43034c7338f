"""A run's numbers and where they go, where its time goes, and which rank holds the others up."""
