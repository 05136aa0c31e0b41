"""The method: torch, and PEFT only for `LoraConfig` and its file names. Read `layer.py` first."""
