"""The subcommands of the console script, one file per command, imported when the command is called."""
