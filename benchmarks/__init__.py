"""The benchmark: this project, PEFT with TRL, the plain form and the floor, side by side; started by `make bench`."""
