"""Benchmarks: each prints ratios from one run. Run with scripts/bench NAME."""
