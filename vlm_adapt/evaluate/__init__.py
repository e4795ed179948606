"""Scores on held-out samples. Imports nothing, so that `--help` stays fast."""
