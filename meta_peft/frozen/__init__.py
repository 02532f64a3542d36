"""The frozen base: its products, and what of it is computed once and kept."""
