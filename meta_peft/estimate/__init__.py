"""How much memory a run will need, without running it."""
