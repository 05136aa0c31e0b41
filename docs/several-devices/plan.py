"""Which engine for which base on which devices, as `plainlora doctor --devices` says, for `plans.md`.

    python -m docs.several-devices.plan

No weight is loaded or looked for: each base is a `config.json` with the sizes of Llama-2, and the quickstart's
tokenizer. The recipe is the quickstart's with FLAGS: bf16 mixed precision, packed rows of 1024 tokens, r=16 on every
linear layer.
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig

import plainlora.quiet  # noqa: F401
from docs.measuring import ROOT
from plainlora.resources.devices import Devices
from plainlora.resources.engines import DevicesNeed, count_engines
from plainlora.resources.model_states import count_model_states
from plainlora.resources.peak import count_memory
from plainlora.settings.programs import SFT
from plainlora.tasks import sft

HERE = Path(__file__).parent
BASES = {
    "7B": {},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8},
    },
}
DEVICES = ("1x24GB", "2x24GB", "4x24GB", "8x24GB", "8x80GB")
FLAGS = (
    *("--precision", "bf16", "--dtype", "auto", "--packing", "true", "--max_length", "1024"),
    *("--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1"),
)


def make_base(folder: Path, sizes: dict[str, int]) -> None:
    """A base without weights: its config and a tokenizer."""
    config = LlamaConfig(
        **sizes, max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, pad_token_id=1, dtype="bfloat16"
    )
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "recipes/quickstart/base").save_pretrained(folder)


def plans(base: str, devices: tuple[str, ...] = DEVICES) -> list[DevicesNeed]:
    """What the doctor counts for a base, by the functions that it calls; all of them see the same counted step."""
    with tempfile.TemporaryDirectory() as name:
        make_base(Path(name), BASES[base])
        recipe = ("--config", str(ROOT / "recipes/quickstart/lora.yaml"), "--model_name_or_path", name)
        again = ("--gradient_checkpointing", "true", "--dataset_name", str(ROOT / "recipes/quickstart"))
        settings = SFT.parse((*recipe, *again, *FLAGS))
        config, tokenizer = sft.read_config(settings), sft.read_tokenizer(settings)
        sft.install_template(settings, tokenizer)
        rows = sft.prepare_rows(settings, tokenizer, lambda line: None)
        plan = sft.plan_run(settings, sft.plan_adapter(settings, config), tokenizer, rows)
        skeletons = plan.build()
        states = count_model_states(plan, *skeletons)
        memory = count_memory(plan, *skeletons, states)
        return [count_engines(plan, *skeletons, states, memory, Devices.parse(each)) for each in devices]


def lines(base: str) -> list[str]:
    """A base's rows of the table: the chosen config, and every engine's total."""
    found = []
    for text, need in zip(DEVICES, plans(base), strict=True):
        chosen = next((engine for engine in need.engines if engine.config == need.choice), None)
        sizes = ", ".join(f"{engine.engine} {(engine.total or 0) / 1e9:.1f}" for engine in need.engines)
        sent = "" if chosen is None else f"{chosen.sent / 1e9:.2f} GB"
        choice = "none fits" if need.choice is None else f"`{need.choice}`"
        found.append(f"| {base} | {text} | {choice} | {sizes} | {need.tokens_per_step:,} | {sent} |")
    return found


def main() -> None:
    """Writes `plans.md`."""
    table = ["| base | devices | choose | GB on each | tokens a step | sent a step |", "|---|---|---|---|---:|---:|"]
    for base in BASES:
        table += lines(base)
        print("\n".join(table[-len(DEVICES) :]), file=sys.stderr, flush=True)
    (HERE / "plans.md").write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
