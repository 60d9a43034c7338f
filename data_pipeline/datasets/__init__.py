"""Data sets as a run names them: shards or image folders read by sample number, mixtures, selections, soft labels."""
