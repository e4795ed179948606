"""From tar shards to batches. Imports nothing, so that `--help` stays fast."""
