"""Where cases come from: the built-in suite, a recipe, a trained adapter, or a model of the user's own."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from trl import ModelConfig, ScriptArguments, SFTConfig

from plainlora.arguments import RecipeArguments
from plainlora.backends import build_lora_config
from plainlora.data.datasets import load_train_and_test
from plainlora.data.prompts import install_template, render_prompt
from plainlora.errors import UserError
from plainlora.lora.interchange import read_config
from plainlora.merging import load_base_for_merge, load_tokenizer_of
from plainlora.models import keep_4bit_weights_unpacked, load_base, load_config, load_tokenizer
from plainlora.parity.case import Case, seed_everything
from plainlora.parsing import StrictParser

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(BYTES) + 2
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Repeat the input.", "input": "one two", "output": "one two"},
    {"instruction": "Add one.", "input": "41", "output": "42"},
    {"instruction": "Say yes.", "input": "", "output": "yes"},
    {"instruction": "Which word is last?", "input": "sun moon star", "output": "star"},
    {"instruction": "Name an animal.", "input": "", "output": "A goose."},
]


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, EOS 0 and pad 1: no vocabulary has to be had from anywhere."""
    vocabulary = {"<|endoftext|>": 0, "<|pad|>": 1} | {byte: number for number, byte in enumerate(BYTES, 2)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
    install_template(fast, "alpaca")
    return fast


def _llama(**options: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaConfig(**(sizes | SPECIAL | {"num_key_value_heads": 1, "vocab_size": VOCABULARY} | options))


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _llama,
    # The model's own dropout would only hide the adapter's.
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_head=2, n_layer=2, n_positions=512, vocab_size=VOCABULARY,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SPECIAL,
    ),
    "qwen2": lambda: Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, tie_word_embeddings=True, **SPECIAL,
    ),
    "distilbert": lambda: DistilBertConfig(
        dim=64, hidden_dim=128, n_layers=2, n_heads=2, vocab_size=VOCABULARY, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0, pad_token_id=1,
    ),
}  # fmt: skip


def random_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with the same random weights every time, as the class its config is for."""
    seed_everything(0)
    return model_class(config).from_config(config, dtype=dtype).eval()


def model_class(config: PretrainedConfig) -> Any:
    """The Auto class for a config: a decoder's language model, else a classifier."""
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return AutoModelForCausalLM
    mapping = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    is_encoder = type(config) in mapping and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return AutoModelForSequenceClassification if is_encoder else AutoModelForCausalLM


def quantized_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The same random weights in bitsandbytes' 4 or 8 bits, computing in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(config).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
        )
    keep_4bit_weights_unpacked(model)
    return model.eval()


def _random_batch(
    vocabulary: int, classes: int | None = None, rows: int = 2, length: int = 24
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (rows, length), generator=generator)
    labels = ids.clone() if classes is None else torch.arange(rows) % classes
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _causal(
    name: str, make_base: Callable[[], PreTrainedModel], steps: int, exact: bool = True, **options: Any
) -> Case:
    training = {"max_steps": steps, "max_length": 512} | options.pop("training", {})
    adapter: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "lora_dropout": 0.1}
    batch = _random_batch(VOCABULARY)
    return Case(
        name=name,
        make_base=make_base,
        config=LoraConfig(**(adapter | options)),
        inputs=batch,
        rows=Dataset.from_list(ROWS),
        tokenizer=byte_tokenizer(),
        training=training,
        prompts=batch["input_ids"][:, :8],
        exact=exact,
    )


def built_in_cases(steps: int) -> Iterator[Case]:
    """The suite: module kinds, architectures, precisions, and every supported start.

    alpha / r is 1.5, no power of two, so that the order of a product and a sum would show in the last bit.
    """

    def llama() -> PreTrainedModel:
        return random_model(_llama())

    def gpt2(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return random_model(CONFIGS["gpt2"](), dtype)

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    yield _causal("Llama, nn.Linear", llama, steps, target_modules="all-linear")
    yield _causal("GPT-2, Conv1D", gpt2, steps, target_modules="all-linear")
    yield _causal("Qwen2, PEFT's targets", lambda: random_model(CONFIGS["qwen2"]()), steps)
    yield Case(
        name="DistilBERT, classifier",
        make_base=lambda: random_model(CONFIGS["distilbert"]()),
        config=LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["q_lin", "v_lin", "lin1"]
        ),
        inputs=_random_batch(VOCABULARY, classes=2, rows=6),
        training={"max_steps": steps},
    )
    yield _causal("Llama, NF4", lambda: quantized_model(_llama(), **nf4), steps, exact=False)
    yield _causal(
        "Llama, NF4 nested",
        lambda: quantized_model(_llama(), bnb_4bit_use_double_quant=True, **nf4),
        steps,
        exact=False,
    )
    yield _causal("Llama, 8-bit", lambda: quantized_model(_llama(), load_in_8bit=True), steps, exact=False)
    yield _causal(
        *("GPT-2, patterns, rsLoRA, biases", gpt2, steps),
        target_modules=["c_attn", "c_fc"],
        rank_pattern={"c_fc": 3},
        alpha_pattern={r"h\.1\.attn\.c_attn": 5},
        use_rslora=True,
        bias="lora_only",
    )
    yield _causal("Llama, head trained whole", llama, steps, modules_to_save=["lm_head"])
    yield _causal("Llama, gaussian start", llama, steps, init_lora_weights="gaussian")
    yield _causal("GPT-2, random start", gpt2, steps, init_lora_weights=False)
    yield _causal("GPT-2, fp64", lambda: gpt2(torch.float64), steps)
    yield _causal("Llama, bf16", lambda: random_model(_llama(), torch.bfloat16), steps)
    yield _causal("Llama, checkpointing", llama, steps, training={"gradient_checkpointing": True})
    yield _causal("GPT-2, packed", gpt2, steps, training={"packing": True})


def _prompt_ids(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The first prompt, rendered: one row, so that no padding comes between the two sides."""
    ids = tokenizer(render_prompt(prompts[0], tokenizer), add_special_tokens=False, return_tensors="pt").input_ids
    return torch.as_tensor(ids)


def recipe_case(config: str, flags: list[str], steps: int) -> Case:
    """A recipe's own model, adapter and rows.

    Args:
        config: The recipe's YAML.
        flags: More of the recipe's flags, as for `recipes/sft.py`.
        steps: Optimizer steps of the trajectory.

    Raises:
        UserError: As `recipes/sft.py` would.
    """
    parser = StrictParser((RecipeArguments, ScriptArguments, SFTConfig, ModelConfig))
    recipe, script, training, model = parser.parse(["--config", config, *flags])
    tokenizer = load_tokenizer(str(model.model_name_or_path), model.model_revision, eos_token=training.eos_token)
    install_template(tokenizer, recipe.prompt_template or training.chat_template_path)
    rows, _ = load_train_and_test(
        str(script.dataset_name),
        config=script.dataset_config,
        train_split=script.dataset_train_split,
        test_split=script.dataset_test_split,
        test_name=None,
        test_split_size=None,
        max_train_rows=None,
        seed=training.seed,
    )
    limit = training.max_length or 10**9
    short = _rows_within(rows, tokenizer, limit, training.dataset_text_field, 4 * steps * training.train_batch_size)
    names = ("per_device_train_batch_size", "learning_rate", "max_length", "packing", "completion_only_loss")
    settings = {name: getattr(training, name) for name in (*names, "weight_decay", "max_grad_norm")}
    batch = tokenizer([render_prompt(text, tokenizer) for text in ("Name three colours.", "Name three trees.")],
                      add_special_tokens=False, padding=True, return_tensors="pt")  # fmt: skip
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return Case(
        name=config,
        make_base=lambda: load_base(model, training.trust_remote_code, training.model_init_kwargs).eval(),
        config=build_lora_config(model, recipe),
        inputs={"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels},
        rows=short,
        tokenizer=tokenizer,
        training=settings | {"max_steps": steps, "gradient_checkpointing": training.gradient_checkpointing},
        text_column=training.dataset_text_field,
        prompts=_prompt_ids(recipe.sample_prompts or ["Name three colours."], tokenizer),
        seed=training.seed,
        exact=not (model.load_in_4bit or model.load_in_8bit) and not torch.accelerator.is_available(),
    )


def _rows_within(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, text_column: str, enough: int
) -> Dataset:
    """The first rows that fit whole: TRL would cut a longer one, this package would drop it."""
    from plainlora.data.encoding import Encoder, find_schema  # noqa: PLC0415

    encode = Encoder(tokenizer, find_schema(rows, text_column, "rows"), text_column, answers_only=False)
    kept = [
        number for number in range(min(len(rows), 4 * enough)) if len(encode(rows[number])["input_ids"]) <= max_length
    ]
    if not kept:
        raise UserError(f"no row of the recipe fits max_length={max_length}; raise it with --max_length")
    return rows.select(kept[:enough])


def adapter_case(adapter: str, prompt: str | None, dtype: torch.dtype | str) -> Case:
    """A trained adapter, loaded into both sides.

    Raises:
        UserError: Its base cannot be had.
        LoRAError: The folder holds no LoRA adapter.
    """
    tokenizer = load_tokenizer_of(adapter)
    ids = _prompt_ids([prompt or "Name three primary colours."], tokenizer)
    return Case(
        name=adapter,
        make_base=lambda: load_base_for_merge(adapter, "16bit", dtype).eval(),
        config=read_config(adapter),
        adapter=adapter,
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids},
        prompts=ids,
        exact=not torch.accelerator.is_available(),
    )


def model_case(name: str, targets: list[str] | str, steps: int) -> Case:
    """Any decoder or encoder that Transformers' Auto classes load, with random tokens for data.

    Raises:
        UserError: The model cannot be had.
    """
    config = load_config(name)
    auto = model_class(config)
    is_classifier = auto is AutoModelForSequenceClassification

    def make_base() -> PreTrainedModel:
        seed_everything(0)  # a classifier's head is new
        try:
            return auto.from_pretrained(name, dtype="auto", use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error

    vocabulary = config.get_text_config().vocab_size
    batch = _random_batch(vocabulary, classes=2 if is_classifier else None, rows=4)
    config.pad_token_id = config.pad_token_id if config.pad_token_id is not None else 0
    task = "SEQ_CLS" if is_classifier else "CAUSAL_LM"
    wanted = targets[0] if targets == ["all-linear"] else targets
    lora = LoraConfig(task_type=task, r=4, lora_alpha=6, lora_dropout=0.1, target_modules=wanted)
    if is_classifier and wanted == "all-linear":
        lora.exclude_modules = r".*(classifier|score).*"  # trained whole
    training: dict[str, Any] = {"max_steps": steps}
    return Case(
        name=name,
        make_base=make_base,
        config=lora,
        inputs=batch,
        training=training,
        prompts=None if is_classifier else batch["input_ids"][:, :8],
        exact=not torch.accelerator.is_available(),
    )


@contextmanager
def quiet_models() -> Iterator[None]:
    """Dozens of tiny models are loaded and saved here; their bars and remarks would bury the comparison."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
        datasets.enable_progress_bars()
