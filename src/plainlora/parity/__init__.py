"""Compares the hand-written LoRA with live PEFT: both are observed in the same way, then compared."""
