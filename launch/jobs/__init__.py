"""Runs as jobs of a cluster: submitting and canceling, what runs on each node, what becomes of it, status and logs."""
