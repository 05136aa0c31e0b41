"""A run's folder: claiming it, recording the run, resuming it and reproducing it."""
