"""Adaptation curves on held-out tasks, what they are scored by, and how they are shown."""
