"""The little world of the demo weights, and how they are trained and scored. `scripts/demo/train.py` is the way in."""
