"""The model that is adapted: its config, its tokenizer, its weights."""
