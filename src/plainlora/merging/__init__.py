"""Merges a saved adapter into its base, checks the merged model, and writes a certificate of the figures."""
