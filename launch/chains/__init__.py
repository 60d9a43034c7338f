"""Chains: stages one after another, on this machine or as jobs, each a command that goes on by itself."""
