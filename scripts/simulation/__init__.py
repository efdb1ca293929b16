"""Simulations of the scheduler under a virtual clock. Run with scripts/simulate."""
