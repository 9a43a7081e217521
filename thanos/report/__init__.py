"""What a run did: its record, and how it is shown."""
