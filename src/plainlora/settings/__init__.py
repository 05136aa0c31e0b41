"""A recipe's settings: which there are, how they are read, and which of them are refused."""
