"""The base model: its config, its tokenizer, its weights."""
