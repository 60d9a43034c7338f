"""Runs as jobs of a cluster: submitting and canceling, what runs on each node, how a job ends, status and logs."""
