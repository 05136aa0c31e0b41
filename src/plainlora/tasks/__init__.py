"""What each program of `recipes/` is made of, as stages that the doctor and `plainlora compare` call too."""
