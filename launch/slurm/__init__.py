"""SLURM's commands, the typed description of a cluster, and checks of one against the other."""
