"""Memory, time and disk: how much there is, and how much a run will need."""
