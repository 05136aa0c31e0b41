"""PEFT, live, as the oracle: the same base under the same seed, once with each implementation."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    GPT2ForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from plainlora import inject
from tests.conftest import CONFIGS, VOCABULARY, make_model, random_ids

Q_LIN = ["q_lin", "lin2"]  # PEFT has no default targets for DistilBERT
DISTILBERT = {"dim": 64, "hidden_dim": 128, "n_heads": 2, "n_layers": 2, "vocab_size": VOCABULARY}
OTHER_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTILBERT)),
    "distilbert-qa": lambda: DistilBertForQuestionAnswering(DistilBertConfig(**DISTILBERT)),
    "gpt2-score": lambda: GPT2ForSequenceClassification(CONFIGS["gpt2"]()),
}
BACKBONES: dict[str, Callable[[], PretrainedConfig]] = {
    "distilbert": lambda: DistilBertConfig(**DISTILBERT),
    "bert": lambda: BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY
    ),
    "gpt2": CONFIGS["gpt2"],
    "llama": CONFIGS["llama"],
}
IN_THE_BACKBONE = {"distilbert": Q_LIN, "bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj"]}
HEAD = {"distilbert": "classifier", "bert": "classifier", "gpt2": "score", "llama": "score"}


def save_backbone(kind: str, directory: Path) -> Path:
    """A checkpoint as for pretraining: without the head of a classifier."""
    torch.manual_seed(0)
    AutoModel.from_config(BACKBONES[kind]()).save_pretrained(directory)
    return directory


def load_classifier(directory: Path, seed: int = 0, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """A classifier of three labels over such a checkpoint, its head drawn under the seed, and the head's names."""
    torch.manual_seed(seed)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=3, output_loading_info=True, **options
    )
    return model, sorted(report["missing_keys"])


def train(model: nn.Module) -> None:
    """A few steps on random ids with random labels; the model is left in evaluation mode."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.01)
    model.train()
    for _ in range(3):
        model(input_ids=random_ids(4), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def make(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """`make_model`, and the models with a classification head."""
    if kind not in OTHER_MODELS:
        return make_model(kind, dtype)
    torch.manual_seed(0)
    model = OTHER_MODELS[kind]().to(dtype)
    torch.manual_seed(0)
    return model.eval()


def config(**options: Any) -> LoraConfig:
    """A config of its own for each side: PEFT writes into the lists it is given."""
    return LoraConfig(**copy.deepcopy(options))


def by_peft(base: PreTrainedModel, **options: Any) -> PeftModel:
    """The model as PEFT makes it, without its remarks on fan_in_fan_out."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config(**options))
    return model.train(base.training)


def by_us(base: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """The model as this package makes it."""
    torch.manual_seed(1)
    return inject(base, config(**options))


def pair(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[PreTrainedModel, PeftModel]:
    """Ours and PEFT's."""
    return by_us(make(kind, dtype), **options), by_peft(make(kind, dtype), **options)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, PEFT's under our names."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".modules_to_save.default.", ".trained_module.")
        .replace(".default.", ".")
        .replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def move(*models: nn.Module) -> None:
    """Moves every trainable parameter away from its start, by the same amounts in each model."""
    for model in models:
        generator = torch.Generator().manual_seed(2)
        for _, parameter in sorted(trainable(model).items()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """On the random ids; the start positions' where a model answers questions."""
    return model(input_ids=random_ids())[0]


def assert_equal_tensors(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same names, and under each the same tensor to the last bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def assert_same_as_peft(kind: str, **options: Any) -> tuple[PreTrainedModel, PeftModel]:
    """Trains the same parameters from the same start, and computes the same before and after they move."""
    ours, theirs = pair(kind, **options)
    assert_equal_tensors(trainable(ours), trainable(theirs))
    assert torch.equal(logits(ours), logits(theirs))
    before = logits(ours)
    move(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), before)
    return ours, theirs


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


def requires_grad(model: nn.Module) -> dict[str, bool]:
    """Which parameters require gradients, a tied one's under each of its names."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}


def save_peft_adapter(folder: Path, base: Path, kind: str = "llama", scale: float = 0.3, **settings: Any) -> str:
    """An adapter that PEFT made and saved, beside its tokenizer, with A and B drawn by the folder's name."""
    chosen: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}
    model = get_peft_model(make_model(kind), LoraConfig(**chosen | settings))
    model.peft_config["default"].base_model_name_or_path = str(base)
    torch.manual_seed(sum(number * ord(letter) for number, letter in enumerate(folder.name, 1)))
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def deltas_by_peft(kind: str, adapter: str) -> dict[str, torch.Tensor]:
    """`s B A` of every module that PEFT adapts, `(d_out, d_in)`, in fp64, with PEFT's own scaling."""
    found = {}
    for name, module in PeftModel.from_pretrained(make_model(kind), adapter).base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            b, a = module.lora_B["default"].weight.double(), module.lora_A["default"].weight.double()
            found[name] = (module.scaling["default"] * b @ a).detach()
    return found
