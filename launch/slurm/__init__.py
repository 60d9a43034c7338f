"""SLURM's commands, and the typed description of a cluster."""
