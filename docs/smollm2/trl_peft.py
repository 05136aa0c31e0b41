"""LoRA with TRL and PEFT alone: what the recipes are measured beside. It imports nothing of this project.

python docs/smollm2/trl_peft.py instruct --base PATH --rows FOLDER --output_dir FOLDER
"""

import argparse
import json
import resource
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import SFTConfig, SFTTrainer

# The same training as recipes/instruct/lora.yaml and recipes/llama2-7b-guanaco/qlora.yaml, in TRL's and PEFT's words.
ADAPTERS: dict[str, dict[str, Any]] = {
    "instruct": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "guanaco": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
}
TRAINING: dict[str, dict[str, Any]] = {
    "instruct": {"packing": True, "lr_scheduler_type": "cosine", "warmup_steps": 0.03},
    "guanaco": {
        "weight_decay": 0.001,
        "max_grad_norm": 0.3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0.03,
        "train_sampling_strategy": "group_by_length",
    },
}


def main() -> None:
    """Trains, saves the adapter, and prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=sorted(ADAPTERS))
    parser.add_argument("--base", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=-1)
    args = parser.parse_args()

    set_seed(42)
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if args.recipe == "guanaco":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(args.base, **options)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=args.output_dir,
            max_length=1024,
            max_steps=args.max_steps,
            num_train_epochs=1,
            learning_rate=2e-4,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulation,
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            **TRAINING[args.recipe],
        ),
        train_dataset=load_dataset("json", data_files=f"{args.rows}/train.jsonl", split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.base),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[args.recipe]),
    )
    outcome = trainer.train()
    trainer.save_model()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = outcome.metrics["train_runtime"]
    print(json.dumps({"steps": outcome.global_step, "seconds": seconds, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
