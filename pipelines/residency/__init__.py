"""Weights in host and device memory: packing, transfer, streaming, prefetching, peak measurement."""
