"""A run's folder, from the first check to the last file: claimed, recorded, resumed, reproduced."""
