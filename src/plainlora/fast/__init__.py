"""Faster forms of LoRA layers, loss heads and activations. Each computes the same function as what it replaces."""
