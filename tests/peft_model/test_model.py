"""Every field of `peft.LoraConfig` through PEFT's own model: the oracle is a plain script of PEFT and TRL."""

import copy
import os
import warnings
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_type_hints

import pytest
import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.warning import PeftWarning
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    SqueezeBertConfig,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from plainlora.backends import BACKENDS, attach_adapter, choose_backend, choose_loader
from plainlora.errors import UserError
from plainlora.fast.loss_head import use_own_loss
from plainlora.lora.config import BOOKKEEPING_FIELDS, SUPPORTED_FIELDS
from plainlora.lora.errors import LoRAError
from plainlora.parity.tiny import byte_tokenizer
from plainlora.training.trainers import AdapterTrainer, PredictedTokensCounted, args_for_sft
from tests.conftest import CONFIGS, load_quantized, make_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
BD = {"nblocks": 2, "target_modules_bd_a": ["o_proj", "down_proj"]}
BD["target_modules_bd_b"] = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn"]
ON_ALL = {"target_modules": "all-linear"}
EXPERTS = "mixtral mixtral+nf4 mixtral+int8"
NOWHERE = ""
EVERYWHERE = "llama gpt2 llama+nf4 llama+int8"
DENSE = "llama gpt2"
QUANTIZED = ("llama+nf4", "llama+int8")
LLAMA = "llama"

# What each field is set to here, and on which models it is trained; on the others of EVERYWHERE it is refused.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "true": ({"init_lora_weights": True}, EVERYWHERE),
    "false": ({"init_lora_weights": False}, EVERYWHERE),
    "gaussian": ({"init_lora_weights": "gaussian"}, EVERYWHERE),
    "use_dora": ({"use_dora": True}, "llama gpt2 llama+nf4"),
    "pissa": ({"init_lora_weights": "pissa"}, DENSE),
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, DENSE),
    "olora": ({"init_lora_weights": "olora"}, LLAMA),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, DENSE),
    "mica": ({"init_lora_weights": "mica"}, DENSE),
    "eva_config": ({"init_lora_weights": "eva"}, EVERYWHERE),
    "corda_config": ({"init_lora_weights": "corda"}, DENSE),
    "lora_ga_config": ({"init_lora_weights": "lora_ga", "lora_ga_config": {}}, DENSE),
    "loftq_config": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}, NOWHERE),
    "megatron_config": ({"megatron_config": {"tensor_model_parallel_size": 1}}, NOWHERE),
    "trainable_token_indices": ({"trainable_token_indices": [5, 6]}, f"{EVERYWHERE} qwen2"),
    "velora_config": ({"velora_config": {"num_groups": 16}}, DENSE),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [7]}, EVERYWHERE),
    "use_qalora": ({"use_qalora": True, "qalora_group_size": 16}, NOWHERE),
    "monteclora_config": ({"monteclora_config": {}}, DENSE),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "llama llama+nf4"),
    "lora_bias": ({"lora_bias": True}, EVERYWHERE),
    "target_parameters": ({"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, EXPERTS),
    "all-linear on experts": (ON_ALL, EXPERTS),
    "use_bdlora": ({"use_bdlora": BD}, LLAMA),
    "arrow_config": ({"arrow_config": {}}, NOWHERE),
    "kasa_config": ({"kasa_config": {}}, LLAMA),
    "ensure_weight_tying": (
        {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
        "gpt2 qwen2 qwen2+nf4 qwen2+int8",
    ),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, f"{EVERYWHERE} qwen2"),
}
BY_HAND = ("true", "false", "gaussian", "use_dora")
ELSEWHERE = ("target_parameters", "all-linear on experts", "ensure_weight_tying")  # need experts, a tied embedding
TRAINED = [(name, kind) for name, (_, kinds) in CASES.items() for kind in kinds.split()]
REFUSED = [
    (name, kind)
    for name in CASES
    for kind in EVERYWHERE.split()
    if name not in ELSEWHERE and (name, kind) not in TRAINED
]
# What plain PEFT takes without a word; below is what it makes of it.
IGNORED_BY_PEFT = [
    *[(name, kind) for name in ("kasa_config", "megatron_config", "monteclora_config") for kind in QUANTIZED],
    *[("use_bdlora", kind) for kind in QUANTIZED],
    *[("use_qalora", kind) for kind in EVERYWHERE.split()],
]
WRONG_IN_PEFT = [("olora", "llama+nf4"), ("olora", "llama+int8"), ("layer_replication", "llama+int8")]
NOT_MERGED = {
    ("embeddings", "gpt2"): r"wte shares its weight with base_model\.model\.lm_head",
    ("embeddings", "qwen2"): r"embed_tokens shares its weight with base_model\.model\.lm_head",
    ("layer_replication", "llama"): "copies of a layer share its weights",
    ("alora_invocation_tokens", "llama"): "PEFT cannot merge this adapter",
    ("alora_invocation_tokens", "gpt2"): "PEFT cannot merge this adapter",
    ("lora_bias", "llama"): "PEFT cannot merge this adapter",
}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "qwen2": ["q_proj"], "mixtral": ["q_proj"]}
IN_GPT2 = {"embed_tokens": "wte", "q_proj": "c_attn"}
STORED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


def test_every_field_of_loraconfig_is_known_here() -> None:
    """A field that a newer PEFT adds makes this test fail, so that it gets a case."""
    covered = {name for values, _ in CASES.values() for name in values} | set(CASES)
    parts = {"qalora_group_size"}
    unknown = {field.name for field in fields(LoraConfig)} - SUPPORTED_FIELDS - BOOKKEEPING_FIELDS - covered - parts
    assert not unknown


def test_every_init_is_known_here() -> None:
    """A value of `init_lora_weights` that a newer PEFT adds makes this test fail, so that it gets a case."""
    (names,) = [
        get_args(kind) for kind in get_args(get_type_hints(LoraConfig)["init_lora_weights"]) if kind is not bool
    ]
    known = {str(values.get("init_lora_weights")) for values, _ in CASES.values()}
    assert {*names, "lora_ga"} <= {name.replace("niter_4", "niter_[number of iters]") for name in known}
    assert {"True", "False"} <= known


@cache
def saved(family: str) -> TemporaryDirectory[str]:
    """A dense model's folder, from which it is quantised."""
    folder = TemporaryDirectory()
    base_of(family).save_pretrained(folder.name)
    return folder


def base_of(kind: str) -> PreTrainedModel:
    """A tiny model by its name, or `name+storage`."""
    kind, _, storage = kind.partition("+")
    if storage:
        return load_quantized(Path(saved(kind).name), **STORED[storage])
    torch.manual_seed(0)
    if kind == "gpt2":  # without dropout, of which padding-free batches draw other numbers
        gpt2 = CONFIGS["gpt2"]()
        gpt2.resid_pdrop = gpt2.embd_pdrop = gpt2.attn_pdrop = 0.0
        return AutoModelForCausalLM.from_config(gpt2).eval()
    if kind != "mixtral":
        return make_model(kind)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = MixtralConfig(**sizes, **tokens, num_key_value_heads=1, num_local_experts=4)
    return MixtralForCausalLM(config).eval()


def config_of(name: str, kind: str) -> LoraConfig:
    family = kind.partition("+")[0]
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"}
    values |= copy.deepcopy(CASES[name][0])
    for field in ("target_modules", "modules_to_save"):
        if family == "gpt2" and field in values:
            values[field] = [IN_GPT2.get(module, module) for module in values[field]]
    return LoraConfig(**values)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(8):
        ids = torch.randint(2, 320, (2, 24), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return found


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(8, 320, (8, 20), generator=generator)
    ids[:, 10] = 7  # aLoRA's invocation
    ids[:, 4], ids[:, 12] = 5, 6  # trained tokens
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def by_plain_peft(kind: str, config: LoraConfig, batches: list[dict[str, torch.Tensor]]) -> PeftModel:
    """As PEFT's documentation has it."""
    base = base_of(kind)
    if config.init_lora_weights == "corda":

        def run() -> None:
            with torch.no_grad():
                for batch in batches:
                    for ids in batch["input_ids"]:
                        base(input_ids=ids[None])

        preprocess_corda(base, config, run_model=run)
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(base, config, lambda: [base(**batch).loss.backward() for batch in batches])  # type: ignore[arg-type, return-value]
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    if config.init_lora_weights == "eva":
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model  # type: ignore[return-value]


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.values += [logs["loss"]] if "loss" in logs else []


class Plain(PredictedTokensCounted, SFTTrainer):
    """TRL's trainer, dividing by the predicted tokens (transformers#46204), without its cast of QLoRA to bf16."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        super().__init__(model, **options)
        for parameter, value in trained.items():
            parameter.data = value


def train(model: nn.Module, folder: Path, backend: str | None) -> list[float]:
    torch.manual_seed(2)
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, max_length=None,
        gradient_checkpointing=False, lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    losses = Losses()
    if backend is None:
        trainer: Any = Plain(model, args=arguments, train_dataset=rows(), processing_class=byte_tokenizer())
        use_own_loss(trainer, one_pass=False)
    else:
        trainer = AdapterTrainer(
            model,
            BACKENDS[backend],
            args=args_for_sft(arguments),
            train_dataset=rows(),
            processing_class=byte_tokenizer(),
        )
    trainer.add_callback(losses)
    trainer.train()
    if backend is not None:
        trainer.save_model()
    return losses.values


def logits_of(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(7)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(rows()["input_ids"][:2])).logits


def check_merge(merge: Any, loaded: nn.Module, trained: torch.Tensor, refusal: str | None) -> None:
    """The merged model computes what was trained, or the refusal is one line."""
    if refusal is None:
        torch.testing.assert_close(logits_of(merge(loaded)), trained, rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(UserError, match=refusal) as caught:
        merge(loaded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), TRAINED)
def test_a_run_is_that_of_plain_peft(
    name: str, kind: str, batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """`peft`: the same bytes; `peft_fused`: losses within 1e-6; what is saved computes what was trained."""
    oracle = by_plain_peft(kind, config_of(name, kind), batches)
    start = logits_of(oracle)
    expected = train(oracle.train(), tmp_path / "plain", None)
    oracle.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    trained = logits_of(oracle)
    backends = ("peft",) if name == "alora_invocation_tokens" else ("peft", "peft_fused")
    for backend in backends:
        folder = tmp_path / backend
        config = config_of(name, kind)
        base = base_of(kind)
        torch.manual_seed(1)
        model = attach_adapter(base, config, BACKENDS[backend], batches=batches)
        torch.testing.assert_close(logits_of(model), start, rtol=1e-5, atol=1e-6)
        losses = train(model.train(), folder, backend)
        assert losses == pytest.approx(expected, rel=1e-6), backend
        assert max(abs(one - losses[0]) for one in losses) > 1e-3, "nothing was trained"
        if backend == "peft":
            PeftModel.save_pretrained(model, str(tmp_path / "raw"), save_embedding_layers=False)  # type: ignore[arg-type]
            for file in ("adapter_model.safetensors",):
                assert (tmp_path / "raw" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
        loader = choose_loader(folder, base_of(kind))
        loaded = loader.load(base_of(kind), folder)
        torch.testing.assert_close(logits_of(loaded), trained, rtol=1e-4, atol=1e-4)
        if backend == "peft" and "+" not in kind:
            check_merge(loader.merge, loaded, trained, NOT_MERGED.get((name, kind)))
        if name == "layer_replication":
            continue
        with BACKENDS[backend].disabled(model):
            before = logits_of(model)
        alone = start if name != "false" else logits_of(base_of(kind))  # which starts as noise
        torch.testing.assert_close(before, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lora_bias", "embeddings", "corda_config", "pissa"])
def test_peft_warns_of_nothing_that_is_meant_when_it_saves_and_loads(
    name: str, batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model = attach_adapter(base_of("llama"), config_of(name, "llama"), BACKENDS["peft"], batches=batches)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, tmp_path, "peft")
        BACKENDS["peft"].load(base_of("llama"), tmp_path)
    assert [str(each.message) for each in said if "peft" in each.filename] == []


def test_peft_still_warns_of_shards(tmp_path: Path) -> None:
    model: Any = attach_adapter(base_of("llama"), config_of("lora_bias", "llama"), BACKENDS["peft"])
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()
    with pytest.warns(PeftWarning, match=r"invalid shape: .*lora_A\.weight:\(\d+,\)"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kind in TRAINED if name not in BY_HAND and "+" not in kind]
)
def test_the_back_end_is_chosen_by_the_config(name: str, kind: str) -> None:
    chosen, why = choose_backend("fused", config_of(name, kind), base_of(kind))
    assert chosen == ("peft" if name == "alora_invocation_tokens" else "peft_fused")
    assert why is not None
    with pytest.raises(LoRAError, match="lora_backend reference: "):
        choose_backend("reference", config_of(name, kind), base_of(kind))
    assert choose_backend("peft", config_of(name, kind), base_of(kind)) == ("peft", None)
    plain = LoraConfig(target_modules=TARGETS[kind])
    assert choose_backend("fused", plain, base_of(kind)) == ("fused", None)


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_peft_cannot_do_is_refused_in_one_line(
    name: str, kind: str, batches: list[dict[str, torch.Tensor]]
) -> None:
    with pytest.raises((UserError, LoRAError)) as caught:
        attach_adapter(base_of(kind), config_of(name, kind), BACKENDS["peft_fused"], batches=batches)
    said = str(caught.value)
    assert "\n" not in said
    ours = said.startswith(tuple(CASES[name][0]))
    assert ours or said.startswith(("PEFT refuses this adapter: ", "PEFT cannot compute with this adapter: "))
    if (name, kind) not in IGNORED_BY_PEFT + WRONG_IN_PEFT:
        with pytest.raises(Exception):  # noqa: B017, PT011
            train(by_plain_peft(kind, config_of(name, kind), batches), Path(os.devnull), None)


@pytest.mark.parametrize(("name", "kind"), IGNORED_BY_PEFT)
def test_what_peft_ignores_would_be_plain_lora(name: str, kind: str) -> None:
    asked, plain = (
        get_peft_model_state_dict(by_plain_peft(kind, config_of(each, kind), [])) for each in (name, "true")
    )
    assert asked.keys() == plain.keys()
    assert all(torch.equal(asked[key], plain[key]) for key in asked)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def off_after_conversion(kind: str, config: LoraConfig, folder: Path) -> float:
    """How far a changed adapter's logits are from those that plain PEFT has of its converted files."""
    model = by_plain_peft(kind, config, [])
    model.save_pretrained(folder / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    trained = logits_of(model)
    model.save_pretrained(folder / "end", path_initial_model_for_weight_conversion=str(folder / "start"))
    return relative(logits_of(PeftModel.from_pretrained(base_of(kind), folder / "end")), trained)


@pytest.mark.parametrize("kind", ["llama", *QUANTIZED])
def test_olora_on_a_rounded_base_would_be_saved_as_another_model(kind: str, tmp_path: Path) -> None:
    off = off_after_conversion(kind, config_of("olora", kind), tmp_path)
    assert off < 1e-5 if kind == "llama" else 3e-3 < off < 3e-2


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["kasa_config", "use_bdlora", "layer_replication", "embeddings"])
def test_what_conversion_loses_would_be_saved_as_another_model(init: str, name: str, tmp_path: Path) -> None:
    config = config_of(name, "llama")
    config.init_lora_weights = init
    assert off_after_conversion("llama", config, tmp_path) > 0.02


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_replicated_layer_in_8_bits_would_compute_something_else(kind: str) -> None:
    model = by_plain_peft(kind, config_of("layer_replication", kind), [])
    dense = get_peft_model(base_of(kind).dequantize(), config_of("layer_replication", kind))
    off = relative(logits_of(model), logits_of(dense))
    assert off < 1e-5 if kind == "llama+nf4" else off > 0.5


def test_a_convolution_is_adapted_by_peft() -> None:
    """SqueezeBERT's layers are convolutions, in groups, to which no delta can be added."""

    def base() -> PreTrainedModel:
        torch.manual_seed(0)
        config = SqueezeBertConfig(
            vocab_size=320, hidden_size=64, embedding_size=64, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=4,
        )  # fmt: skip
        return AutoModelForSequenceClassification.from_config(config).eval()

    def config() -> LoraConfig:
        return LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)

    chosen, why = choose_backend("fused", config(), base())
    assert chosen == "peft_fused"
    assert why is not None
    torch.manual_seed(1)
    ours = attach_adapter(base(), config(), BACKENDS[chosen])
    torch.manual_seed(1)
    theirs = get_peft_model(base(), config())
    gradients = []
    for model in (ours, theirs):
        model(input_ids=torch.tensor(rows()["input_ids"]), labels=torch.tensor([0, 1] * 4)).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match=r"PEFT cannot merge this adapter: .*groups"):
        BACKENDS[chosen].merge(ours)
