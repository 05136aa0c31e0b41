"""A `PeftModel` behind the verbs of `plainlora.backends`: PEFT's own code for what a `LoraConfig` asks for.

PEFT implements more of its `LoraConfig` than the hand-written LoRA. Some of it needs what PEFT leaves to a script:

- PiSSA, OLoRA, CorDA and LoRA-GA start from B A that is not 0 and subtract it from the base. Their adapter belongs to
  that changed base, which for most of them cannot be made again. The final save is converted to one for the unchanged
  base, of twice the rank: `W0 + s (B A - B0 A0)`.
- EVA, CorDA and LoRA-GA compute the start from rows. Without them PEFT would start at random, or fail.

    config.py    what a config means to PEFT, and what it ignores, loses or computes wrongly
    initial.py   initial values from training rows
    model.py     attaches, loads, saves and merges
"""
