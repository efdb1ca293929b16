"""The subcommands of `plantain`, a group to a file. Each has `register(app)`."""
