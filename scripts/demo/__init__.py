"""The little world of the demo weights, and how they are trained and scored. `scripts/train_demo.py` is the way in."""
