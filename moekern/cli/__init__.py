"""The command line: one file a command, with its options, its call and its table."""
