"""Memory, time and disk: what there is, and what a run will need."""
