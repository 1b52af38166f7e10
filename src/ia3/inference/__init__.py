"""Using a trained adapter."""
