"""Training: reading data, the loop, its measures and its report."""
