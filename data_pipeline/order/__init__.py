"""Which sample stands at which position of a run: the order of shards and samples, repeats, and keyed random draws.

Everything here is a pure function of sizes, seed and position; nothing opens a file.
"""
