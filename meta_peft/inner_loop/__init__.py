"""The steps that adapt fast weights to a task, and the way back through them."""
