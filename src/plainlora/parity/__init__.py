"""How far is the hand-written LoRA from PEFT? Both are observed alike, then compared; the oracle is live PEFT."""
