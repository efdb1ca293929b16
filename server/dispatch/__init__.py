"""The dispatcher: the single owner of the queue, the workers and their residency."""
