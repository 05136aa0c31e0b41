"""Publishes a run on the Hub: its model card, its files, and the push."""
