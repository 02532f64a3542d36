"""Adapters as files: saved, loaded and pushed, with what else has to be known of them."""
