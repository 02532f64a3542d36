"""`MetaTrainer`, a thin layer over the Trainer."""
