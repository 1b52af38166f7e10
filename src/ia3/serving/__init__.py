"""Adapters of one base model behind a queue: which there are, how their requests share batches, how they are asked."""
