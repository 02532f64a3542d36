"""What a trained adapter is compared with, at the same compute, and which tasks help it."""
