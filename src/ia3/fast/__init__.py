"""The training step at the hardware's price."""
