"""The run's configuration: its schema and its loading. Knows nothing of torch."""
