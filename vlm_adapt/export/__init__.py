"""What leaves a run: adapters, merged models, soups. Knows files; knows nothing of training."""
