"""Pictures, the report, and what `inspect` prints."""
