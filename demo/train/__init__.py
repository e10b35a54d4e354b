"""Trains the demo speech recognition model; see demo/README.md for the order of the steps."""
