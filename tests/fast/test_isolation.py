"""Packed and padded rows beside the same rows alone, in models that keep them apart and in models that do not."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoConfig,
    Lfm2Config,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    RwkvConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl import SFTConfig

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.errors import UserError
from plainlora.fast.isolation import Isolation, text_tokens
from plainlora.fast.loss_head import rounding_unit
from plainlora.training.trainers import AdapterTrainer, args_for_sft
from tests.conftest import CONFIGS, SPECIAL, VOCABULARY, load_quantized, random_ids

SMALL: dict[str, Any] = {
    **{"hidden_size": 32, "num_attention_heads": 2, "vocab_size": VOCABULARY, **SPECIAL},
    **{"num_hidden_layers": 2, "max_position_embeddings": 256, "intermediate_size": 32},
}
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 1, "head_dim": 16}
APART: dict[str, Callable[[], PretrainedConfig]] = {
    **CONFIGS,
    "gemma3_text": lambda: Gemma3TextConfig(
        **GROUPED, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4),
    "gpt_neo": lambda: GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8,
        vocab_size=VOCABULARY, **SPECIAL,
    ),
}  # fmt: skip
LEAKING: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=32),
    "falcon": lambda: FalconConfig(**SMALL),
    "mpt": lambda: MptConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=VOCABULARY, max_seq_len=256),
    "mamba": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=VOCABULARY),
    "rwkv": lambda: RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, context_length=256),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(**(GROUPED | {"num_hidden_layers": 3})),
}


class CoupledForCausalLM(LlamaForCausalLM):
    """Takes from each row a part of what the rows of its batch have in common."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(0, keepdim=True) / 2
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


class WithoutPositionsForCausalLM(LlamaForCausalLM):
    """Takes nothing that packed rows come with, and no fused head, its logits being halved."""

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, use_cache: Any = None) -> Any:
        output = super().forward(input_ids, attention_mask, use_cache=use_cache)
        output.logits = output.logits / 2
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


def make(config: PretrainedConfig, std: float | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """With freshly drawn weights, or with larger ones, to which the text before a token matters more."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if std is not None and parameter.dim() > 1:
                parameter.normal_(0, std)
    return model


def examine_isolation(model: PreTrainedModel) -> Isolation:
    """The documents and a model's own logits, without a trainer."""

    def logits(batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            return model(**{name: value for name, value in batch.items() if name != "labels"}).logits

    tokens = text_tokens(model)
    return Isolation(logits, tokens, tokens[0], model.device, rounding_unit(model))


def packed_dependence(model: PreTrainedModel) -> float:
    """About 1 if packed documents see each other, about 1e-6 in fp32 if not."""
    found = examine_isolation(model).packed()
    return max(found.replaced, found.alone)


def make_trainer(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast, backend: str = "fused", **options: Any
) -> AdapterTrainer:
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", exclude_modules=".*out_proj")
    ids = [random_ids(1, 30 + number)[0].tolist() for number in range(4)]
    given = {"packing": True, "max_length": 128, "output_dir": str(folder), "use_cpu": True, "bf16": False} | options
    return AdapterTrainer(
        attach_adapter(model, lora, BACKENDS[backend]), BACKENDS[backend],
        args=args_for_sft(SFTConfig(report_to="none", gradient_checkpointing=False, **given)),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}), processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("std", [None, 0.15])
@pytest.mark.parametrize("kind", APART)
def test_what_keeps_documents_apart_is_found_to(kind: str, std: float | None) -> None:
    model = make(APART[kind](), std)
    assert packed_dependence(model) < 1e-4
    isolation = examine_isolation(model)
    assert all(isolation.is_negligible(found) for found in (isolation.packed(), isolation.padded(), isolation.later()))


@pytest.mark.parametrize("std", [None, 0.15])
@pytest.mark.parametrize("kind", LEAKING)
def test_what_lets_documents_see_each_other_is_found_to(kind: str, std: float | None) -> None:
    model = make(LEAKING[kind](), std)
    assert packed_dependence(model) > 0.1
    isolation = examine_isolation(model)
    assert not isolation.is_negligible(isolation.packed())
    assert isolation.is_negligible(isolation.padded())


@pytest.mark.parametrize("backend", ["fused", "reference", "peft"])
def test_u07_packing_of_a_base_that_ignores_positions_is_refused_and_padding_is_not(
    backend: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        UserError, match=r"packing: in OPTForCausalLM a row's outputs depend on .*; set packing to false"
    ):
        make_trainer(make(LEAKING["opt"]()), tmp_path, tokenizer, backend)
    make_trainer(make(LEAKING["opt"]()), tmp_path, tokenizer, backend, packing=False)


def test_what_ends_in_an_error_when_packed_is_refused_with_its_reason(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_ff_dim=32)
    with pytest.raises(UserError, match=r"packing: Lfm2ForCausalLM cannot keep rows apart .*causal_conv1d"):
        make_trainer(make(config), tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"padding_free: WithoutPositionsForCausalLM cannot keep .*argument"):
        make_trainer(
            WithoutPositionsForCausalLM(CONFIGS["llama"]()), tmp_path, tokenizer, "reference", packing=False,
            padding_free=True, max_length=None,
        )  # fmt: skip


def test_a_batch_whose_rows_depend_on_each_other_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    said = r"per_device_train_batch_size: in CoupledForCausalLM .*; set per_device_train_batch_size to 1"
    with pytest.raises(UserError, match=said):
        make_trainer(CoupledForCausalLM(CONFIGS["llama"]()), tmp_path, tokenizer, "reference", packing=False)
    one = {"packing": False, "per_device_train_batch_size": 1}
    make_trainer(CoupledForCausalLM(CONFIGS["llama"]()), tmp_path, tokenizer, "reference", **one)
    # Without padding the rows of a batch are one row, which couples with no other.
    make_trainer(CoupledForCausalLM(CONFIGS["llama"]()), tmp_path, tokenizer, packing=False)


def test_a_base_that_reads_ahead_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"BertLMHeadModel reads the tokens that it is to predict .* another base"):
        make_trainer(make(BertConfig(**SMALL)), tmp_path, tokenizer, packing=False)
    make_trainer(make(BertConfig(**SMALL, is_decoder=True)), tmp_path, tokenizer, packing=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [None, 0.15])
def test_in_half_precision_a_leak_is_told_from_rounding(dtype: torch.dtype, std: float | None) -> None:
    for config, apart in ((APART["llama"], True), (APART["mixtral"], True), (LEAKING["recurrent_gemma"], False)):
        isolation = examine_isolation(make(config(), std, dtype))
        assert isolation.is_negligible(isolation.packed()) == apart


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_keeps_documents_apart(bits: str, model_dirs: dict[str, Path]) -> None:
    isolation = examine_isolation(load_quantized(model_dirs["llama"], **{bits: True}))
    assert isolation.is_negligible(isolation.packed())
    assert isolation.is_negligible(isolation.padded())


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_takes_no_time_that_anyone_would_notice(kind: str) -> None:
    model = make(CONFIGS[kind]())
    begin = time.process_time()
    examine_isolation(model).packed()
    assert time.process_time() - begin < 1
