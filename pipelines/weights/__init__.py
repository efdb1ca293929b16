"""Weights on disk: where they come from, how they get here whole, and how that is checked later."""
