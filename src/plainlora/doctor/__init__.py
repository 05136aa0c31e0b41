"""What would go wrong in training, said before a weight is loaded."""
