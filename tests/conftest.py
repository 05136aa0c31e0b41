"""Tiny real models and a tiny real tokenizer, made here from configs: no hub, no downloaded weight."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BitsAndBytesConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from plainlora.fast.fuse import fuse
from tests.refusals import Run, snapshot, the_one_line

ROOT = Path(__file__).parent.parent
CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromedriver")  # Debian's
VOCABULARY = 320
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}

# Multiples of 64, bitsandbytes' block size, so that the same shapes serve the quantised tests.
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_head=2, n_layer=2, n_positions=256, vocab_size=VOCABULARY, loss_type="ForCausalLM", **SPECIAL
    ),
    "llama": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=256, **SPECIAL,
    ),
    "qwen2": lambda: Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=True, **SPECIAL,
    ),
}  # fmt: skip

# Encoders and decoders as they come to be made classifiers: the checkpoint has no head.
BACKBONES: dict[str, Callable[[], PretrainedConfig]] = {
    "distilbert": lambda: DistilBertConfig(
        dim=64, hidden_dim=128, n_layers=2, n_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64,
        pad_token_id=0,
    ),
    "bert": lambda: BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=64, pad_token_id=0,
    ),
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_head=2, n_layer=2, n_positions=64, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    ),
}  # fmt: skip

# Told apart by their words; of many lengths, so that there is padding.
TEXTS = [
    {"text": f"win a {'big ' * (number % 7)}prize now {number}", "label": "spam"}
    if number % 3 == 0
    else {"text": f"see you {'very ' * (number % 5)}soon at {number}", "label": "ham"}
    for number in range(120)
]

ROWS = [
    {"instruction": f"Say the number after {number}.", "input": "", "output": f"It is {number + 1}."}
    if number % 2
    else {"instruction": "Repeat the input.", "input": f"word{number} and more", "output": f"word{number} and more"}
    for number in range(40)
]


# Below tests/: what runs whole programs, commands or trainers, which `make test` leaves to `make test-all`.
INTEGRATION = (
    *("recipes/", "commands/", "experiments/", "benchmarks/", "compat/", "docs/test_from_scratch.py"),
    *("hub/test_repository.py", "merging/test_merge.py", "parity/test_faults.py", "parity/test_architectures.py"),
    *("lora/storage/test_torchao.py", "training/test_evaluation_loss.py", "test_prediction.py"),
    *("test_fuzz.py", "test_safety.py", "test_quiet.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tiers; a test that needs a GPU or a browser is reported as not run where there is none."""
    for item in items:
        if item.path.relative_to(ROOT / "tests").as_posix().startswith(INTEGRATION):
            item.add_marker(pytest.mark.integration)
    missing = {"gpu": "GPU"} if not torch.cuda.is_available() else {}
    missing |= {"browser": "Chromium"} if not all(map(os.path.isfile, CHROMIUM)) else {}
    for marker, what in missing.items():
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"not run: no {what}"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model with the same weights every time, in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype)
    torch.manual_seed(0)
    return model.eval()


def fused_in_place(model: Any) -> Any:
    """The same model, fused."""
    fuse(model)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the rows above: id 0 is EOS, id 1 is a pad token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in ROWS for text in row.values()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", model_max_length=256
    )


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A folder for each tiny model, as the Hub would hold it: weights, config, tokenizer."""
    folders = {}
    for kind in CONFIGS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        make_model(kind).save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over the texts above, with BERT's special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((row["text"] for row in TEXTS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


@pytest.fixture(scope="session")
def backbone_dirs(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    word_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Path]:
    """A folder for each tiny backbone, as the Hub would hold it. GPT-2 has no pad token, as its own has none."""
    folders = {}
    for kind, config in BACKBONES.items():
        folders[kind] = tmp_path_factory.mktemp(f"backbone-{kind}")
        torch.manual_seed(0)
        AutoModel.from_config(config()).save_pretrained(folders[kind])
        if kind == "gpt2":
            without_pad = copy.deepcopy(tokenizer)
            without_pad.pad_token = None
            without_pad.save_pretrained(folders[kind])
        else:
            word_tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts above as csv."""
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows above as JSON lines."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def load_quantized(directory: Path, **options: object) -> PreTrainedModel:
    """The model in bitsandbytes' 4 or 8 bits, computing in fp32."""
    from plainlora.base.loading import load_causal_lm

    if options.get("load_in_4bit"):
        options.setdefault("bnb_4bit_compute_dtype", torch.float32)
    return load_causal_lm(str(directory), dtype=torch.float32, quantization=BitsAndBytesConfig(**options)).eval()


def random_ids(rows: int = 2, length: int = 16) -> torch.Tensor:
    """Token ids that mean nothing, the same every time."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def run_program(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python COMMAND` from the project's root, as a user would, and captures what it prints."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def make_peft_trainer(folder: Path, **options: Any) -> SFTTrainer:
    """An existing script: TRL's trainer of a model that PEFT adapts. In the first row, 4 tokens of 16 have a label."""
    from plainlora.parity.tiny import byte_tokenizer

    ids = random_ids(8, 16)
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    rows[0]["labels"] = [-100] * 12 + rows[0]["labels"][12:]
    given: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 2, "report_to": "none", "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    arguments = SFTConfig(output_dir=str(folder), **(given | options))
    set_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules="all-linear")
    return SFTTrainer(
        make_model("llama"), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(), peft_config=lora,
    )  # fmt: skip


@pytest.fixture
def plainlora(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process and returns its one line."""

    from plainlora.commands import main

    def run(*arguments: str | Path) -> str:
        before = snapshot(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as raised:
            main([str(argument) for argument in arguments])
        assert snapshot(tmp_path) == before
        assert not (tmp_path / "out").exists()
        return the_one_line(raised.value.code, *capfd.readouterr())

    return run
