"""The benchmark: this package, PEFT with TRL, the plain form and the floor, side by side in one run."""
