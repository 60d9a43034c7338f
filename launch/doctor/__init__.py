"""`pretrain doctor`: what is wrong before anything is started, one subject per file. A check changes nothing."""
