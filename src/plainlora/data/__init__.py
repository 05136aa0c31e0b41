"""Rows: read, checked, rendered by one template, turned into tokens."""
