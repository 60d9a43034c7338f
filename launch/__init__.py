"""Everything that starts processes: the command line, ranks on this machine, jobs of a cluster, chains and suites."""
