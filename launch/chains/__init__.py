"""Chains run stages one after another, on this machine or as jobs; each stage is a command that goes on by itself."""
