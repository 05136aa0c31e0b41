"""A recipe's settings: which there are, how they are read, which of them cannot be honoured."""
