"""The stages of each program of `recipes/`, which `plainlora doctor` and `plainlora compare` call too."""
