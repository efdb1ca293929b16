"""The model catalogue: reads and validates weights.toml."""
