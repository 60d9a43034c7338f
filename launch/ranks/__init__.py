"""N processes on this machine, started and stopped together, none of which outlives its launcher."""
