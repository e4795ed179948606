"""Training: engine, optimizer, loop, checkpoints, journal. Imports nothing, so that `--help` stays fast."""
