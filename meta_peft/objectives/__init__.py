"""From a model's output to one loss and one score per task."""
