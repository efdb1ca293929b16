"""Users, API keys, plans, limits, credits and usage: functions on the connection, in the caller's transaction."""
