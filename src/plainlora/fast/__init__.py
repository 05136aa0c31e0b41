"""What makes it fast, each the same map as what it takes the place of: LoRA layers, loss heads, activations."""
