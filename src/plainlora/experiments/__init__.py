"""Many runs of a recipe: the methods side by side, and a search for better settings."""
