"""Tower, connector and language put together: one road for training, evaluation and chat."""
