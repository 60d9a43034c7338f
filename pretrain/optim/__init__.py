"""Optimizers over named parameter groups, learning-rate schedules, and moving averages of weights."""
