"""The tasks and episodes that the options of a run name."""
