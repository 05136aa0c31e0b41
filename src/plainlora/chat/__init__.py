"""A conversation with a base and the adapters on it, in a terminal or on a local page."""
