"""Models: what they are, where their weights lie, and how each family runs them. Never imports the server."""
