"""The trainers, and what makes a run safe while it lasts."""
