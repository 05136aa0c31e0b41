"""The trainers, and the checks and saves during training."""
