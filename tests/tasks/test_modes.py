"""What each method trains, counted on the full-size architectures (`meta` device: shapes without weights)."""

from typing import Any

import pytest
import torch
from transformers import BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, PretrainedConfig, ViTConfig
from trl import ModelConfig

from plainlora.backends import BACKENDS, count_parameters
from plainlora.base.classifier import build_skeleton, check_order
from plainlora.errors import UserError
from plainlora.lora.errors import LoRAError
from plainlora.settings.arguments import PROJECTIONS, ClassifyArguments
from plainlora.settings.programs import CLASSIFY
from plainlora.tasks.last_layers import find_last_layers
from plainlora.tasks.modes import build_classifier_lora, train_adapter, train_weights
from plainlora.tasks.projections import find_head, find_projections
from tests.conftest import BACKBONES, ROOT

DISTILBERT, GPT2 = DistilBertConfig(), GPT2Config(pad_token_id=50256)


def parse(recipe: str, *flags: str) -> tuple[ClassifyArguments, ModelConfig]:
    parsed = CLASSIFY.parse(["--config", str(ROOT / "recipes" / recipe), *flags])
    return parsed.recipe, parsed.model


def trained(recipe: str, config: PretrainedConfig, *flags: str) -> int:
    """How many parameters the recipe trains of an architecture."""
    arguments, model_args = parse(recipe, *flags)
    model = build_skeleton(config)
    if arguments.method == "lora":
        lora = build_classifier_lora(model_args, arguments, model)
        with torch.device("meta"):
            return count_parameters(train_adapter(model, lora, BACKENDS["fused"], "float32", ()).model)[0]
    layers = find_last_layers(model, arguments.last_layers, find_head) if arguments.method == "last_layers" else None
    for name, parameter in model.named_parameters():
        chosen = layers is None or any(name.startswith(f"{layer}.") for layer in layers)
        parameter.requires_grad_(chosen)
    return count_parameters(model)[0]


@pytest.mark.parametrize("backend", ["reference", "peft"])
@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ("lora", [], 147_456),  # 6 layers of query and value: 6 * 2 * 8 * (768 + 768)
        ("lora_best", [], 516_096),  # and of the MLP: + 6 * 2 * 8 * (768 + 3072)
        ("lora", ["--lora_head", "true"], 147_456 + 8 * (768 + 768) + 8 * (768 + 2)),
        ("lora", ["--train_head", "true"], 147_456 + 592_130),
    ],
)
def test_lora_on_distilbert_trains_what_the_source_says(
    recipe: str, flags: list[str], expected: int, backend: str
) -> None:
    assert trained(f"distilbert-imdb/{recipe}.yaml", DISTILBERT, "--lora_backend", backend, *flags) == expected


def test_the_baselines_of_distilbert_train_what_the_source_says() -> None:
    last, whole = (trained(f"distilbert-imdb/{name}.yaml", DISTILBERT) for name in ("last_layers", "full"))
    assert last == 592_130 == 768 * 768 + 768 + 768 * 2 + 2
    assert whole == 66_955_010
    assert round(last / 147_456) == 4
    assert round(whole / 147_456) == 454


@pytest.mark.parametrize("backend", ["reference", "peft"])
def test_lora_on_gpt2_trains_every_linear_layer_and_the_sources_count_splits_query_key_and_value(backend: str) -> None:
    r, d = 16, 768
    merged = 12 * (r * (d + 3 * d) + r * (d + d) + 2 * r * (d + 4 * d)) + r * (d + 2)
    apart = 12 * (3 * r * (d + d) + r * (d + d) + 2 * r * (d + 4 * d)) + r * (d + 2)
    assert trained("gpt2-sms-spam/lora.yaml", GPT2, "--lora_backend", backend) == merged == 2_371_616
    assert apart == 2_666_528


def test_scaling_by_alpha_itself_is_this_alpha_times_r() -> None:
    for recipe, source in (("lora", 16), ("lora_best", 1)):
        _, model = parse(f"distilbert-imdb/{recipe}.yaml")
        assert model.lora_alpha / model.lora_r == source
    _, model = parse("gpt2-sms-spam/lora.yaml")
    assert (model.lora_r, model.lora_alpha) == (16, 16)


@pytest.mark.parametrize(
    "config", [DISTILBERT, GPT2, BertConfig(), LlamaConfig(pad_token_id=0)], ids=lambda c: c.model_type
)
def test_the_kinds_share_out_every_linear_layer_without_overlap(config: PretrainedConfig) -> None:
    model = build_skeleton(config)
    linear = {
        name for name, module in model.named_modules() if hasattr(module, "weight") and "Linear" in str(type(module))
    }
    linear |= {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}

    def modules(*kinds: str) -> set[str]:
        ends = find_projections(model, kinds)
        return {name for name in linear if any(name == end or name.endswith(f".{end}") for end in ends)}

    groups = [("query", "key", "value")] if config.model_type == "gpt2" else [("query",), ("key",), ("value",)]
    parts = [modules(*group) for group in (*groups, ("projection",), ("mlp",), ("head",))]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert set().union(*parts) == linear == modules(*PROJECTIONS)
    assert modules("head") == set(find_head(model))


@pytest.mark.parametrize(
    ("config", "recipe", "flags", "message"),
    [
        (GPT2, "gpt2-sms-spam/lora", ["--lora_key", "false"], "lora_query, lora_key, lora_value all on or all off"),
        (DISTILBERT, "distilbert-imdb/lora", ["--lora_target_modules", "q_lin"], "not both; --lora_query false"),
        (DISTILBERT, "distilbert-imdb/last_layers", ["--last_layers", "classifer"], "no module 'classifer'"),
        (DISTILBERT, "distilbert-imdb/last_layers", ["--last_layers", "ffn"], "did you mean distilbert.transformer"),
        (ViTConfig(), "distilbert-imdb/lora", [], "vit models have no sequence classifier"),
    ],
)
def test_what_does_not_fit_the_architecture_is_refused(
    config: PretrainedConfig, recipe: str, flags: list[str], message: str
) -> None:
    with pytest.raises((UserError, LoRAError)) as raised:
        trained(f"{recipe}.yaml", config, *flags)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_head", "true", "--train_head", "true"], "the head carries LoRA or is trained whole, not both"),
        (["--method", "full", "--load_in_4bit", "true"], "which is not possible in 4 or 8 bits"),
        (["--method", "full", "--merge"], "there is nothing to merge"),
        (["--last_layers", "classifier"], "last_layers belongs to --method last_layers"),
        (["--lora_task_type", "TOKEN_CLS"], "this program classifies sequences"),
        (["--validation_split_size", "1.5"], "validation_split_size is a share below 1 or a whole number"),
        (["--measured_train_rows", "0"], "measured_train_rows must be at least 1"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse("distilbert-imdb/lora.yaml", *flags)
    assert message in str(raised.value)


@pytest.mark.parametrize("modules", [None, ["pre_classifier", "classifier"]], ids=["full", "last layers"])
def test_disabled_is_the_model_as_it_was_before_training(modules: Any) -> None:
    torch.manual_seed(0)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(BACKBONES["distilbert"]()).eval()
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    trainee = train_weights(model, modules)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    after = model(ids).logits
    with trainee.disabled():
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, after)
    assert not torch.equal(after, before)


def test_a_classifier_whose_classes_have_another_order_is_refused(tmp_path: Any) -> None:
    """Its head would be kept, under the wrong names."""
    config = BertConfig(id2label={0: "Positive", 1: "negative"}, architectures=["BertForSequenceClassification"])
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="of these classes in another order; set labels to positive, negative"):
        check_order(str(tmp_path), ["negative", "positive"])
    for labels in (["positive", "negative"], ["ham", "spam"]):
        check_order(str(tmp_path), labels)
