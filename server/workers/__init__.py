"""The process that owns one device, the server's handle on it, and their protocol."""
