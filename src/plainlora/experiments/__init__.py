"""Many runs of a recipe: a comparison of finetuning modes, and a search for better settings."""
