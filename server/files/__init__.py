"""Files that come in and go out: guarded fetching, decoding checks, storage."""
