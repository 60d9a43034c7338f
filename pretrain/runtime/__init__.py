"""What a process of a run stands on: ranks and collectives, environment, signals, the run's folder and progress."""
