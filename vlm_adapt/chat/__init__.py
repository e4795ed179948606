"""Talking to what was trained: history, session, terminal. Imports nothing, so that `--help` stays fast."""
