"""The HTTP server, its queue and its workers."""
