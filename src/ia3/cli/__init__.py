"""The command `ia3`, one file a subcommand."""
