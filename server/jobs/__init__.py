"""Jobs: the record of one request, its database row and its Idempotency-Key."""
