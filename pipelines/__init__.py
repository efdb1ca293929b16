"""Models: the catalogue, installed weights, residency on devices, one adapter per family. Never imports the server."""
