"""Better Auth's sessions, passwords and API keys, as its official clients know them."""
