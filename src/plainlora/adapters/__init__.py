"""Several saved adapters: on one base, combined into one, and compared."""
