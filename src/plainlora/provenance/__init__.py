"""What a run was made of, and how its adapter finds its base again."""
