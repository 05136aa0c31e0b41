"""Loads a merged model as a stranger would, with plain Transformers, and writes its logits.

Run as a file, `python reload.py MODEL PROBES LOGITS`, so that nothing of this package is imported.
"""

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig


def main(directory: str, probes: str, logits: str) -> None:
    """Reads token ids (safetensors), writes fp32 logits under the same names."""
    architecture = AutoConfig.from_pretrained(directory).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(directory, dtype="auto").eval()
    with torch.no_grad():
        outputs = {name: model(input_ids=ids).logits.float().contiguous() for name, ids in load_file(probes).items()}
    save_file(outputs, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
