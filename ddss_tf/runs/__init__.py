"""A run's files: its directory, checkpoints, records and progress."""
