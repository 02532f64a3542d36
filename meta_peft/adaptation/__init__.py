"""What a user calls on a new task: support rows in, adapted adapters out."""
