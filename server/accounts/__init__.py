"""Users, API keys, plans, limits, credits and usage, as functions on an open transaction."""
