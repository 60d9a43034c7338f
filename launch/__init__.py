"""How anything is started: the command line, ranks on this machine, jobs of a cluster, chains and suites."""
