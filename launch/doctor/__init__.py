"""`pretrain doctor` checks everything before anything is started, one subject per file. A check changes nothing."""
