"""Finds what would go wrong in training, before a weight is loaded."""
