"""What happens beside the training steps: evaluations, the online probe, and pictures."""
