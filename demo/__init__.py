"""The demo: clips, a tiny speech recognition model, and how both were made."""
