"""The loss and its gradients that a trainer computes, beside those of the model's own forward with labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaForCausalLM,
    MixtralConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl import SFTConfig, SFTTrainer

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.errors import UserError
from plainlora.fast.fuse import fuse
from plainlora.fast.loss_head import base_of, use_one_pass_head
from plainlora.training.trainers import AdapterTrainer, args_for_sft
from tests.conftest import CONFIGS, SPECIAL, VOCABULARY, load_quantized, make_peft_trainer, random_ids


class HalvedForCausalLM(LlamaForCausalLM):
    """Logits that no attribute of the config tells of."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


class WithTermForCausalLM(LlamaForCausalLM):
    """A loss with a term of its own: the squared logarithm of the normaliser, as in PaLM."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 0.01 * output.logits.logsumexp(-1).square().mean()
        return output


class RefusingForCausalLM(LlamaForCausalLM):
    """No loss of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        if kwargs.pop("labels", None) is not None:
            raise TypeError("forward() got an unexpected keyword argument 'labels'")
        return super().forward(*args, **kwargs)


SMALL: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 256},
    **SPECIAL,
}
CONFIG: dict[str, Callable[[], Any]] = {
    **CONFIGS,
    "phi": lambda: PhiConfig(**SMALL),  # with a bias
    "opt": lambda: OPTConfig(**(SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.0})),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=3.0),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.2),
    "gemma2": lambda: Gemma2Config(**SMALL, final_logit_softcapping=0.5),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, router_aux_loss_coef=0.1),
    "modernbert-decoder": lambda: ModernBertDecoderConfig(**SMALL, local_attention=16, cls_token_id=0, sep_token_id=0),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(**(SMALL | {"num_hidden_layers": 3}), logits_soft_cap=0.5),
    "granitemoe": lambda: GraniteMoeConfig(**SMALL, num_local_experts=4, router_aux_loss_coef=0.1, logits_scaling=2.0),
}
# The form of the head that each ends with: fused first, then peft and reference.
FORMS = {
    **dict.fromkeys((*CONFIGS, "phi", "opt"), ("one pass", "TRL")),
    **dict.fromkeys(("granite", "cohere", "gemma2", "mixtral"), ("TRL", "TRL")),
    **dict.fromkeys(("modernbert-decoder", "recurrent_gemma", "granitemoe", "halved", "with term"), ("own", "own")),
}
ADAPTED = r".*(q_proj|v_proj|c_attn|Wqkv|attn\.Wi|up_proj|q_attn|k_proj)"


def make(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model whose logits are far enough from 0 for a cap or a factor to show."""
    torch.manual_seed(0)
    if kind in ("halved", "with term"):
        model: PreTrainedModel = {"halved": HalvedForCausalLM, "with term": WithTermForCausalLM}[kind](
            CONFIGS["llama"]()
        ).to(dtype)
    else:
        config = CONFIG[kind]()
        if isinstance(config, GPT2Config):
            config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def make_trainer(
    model: PreTrainedModel, backend: str, folder: Path, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> AdapterTrainer:
    """A trainer of an adapter that is not 0, over rows of one length: a batch is one of the model's own."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0, target_modules=ADAPTED)
    adapted = attach_adapter(model, lora, BACKENDS[backend])
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    given = {"packing": False, "max_length": 64, "per_device_train_batch_size": 3} | options
    arguments = SFTConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
        logging_steps=1, **({"bf16": False} | given),
    )  # fmt: skip
    ids = random_ids(9, 24).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 5 + row[5:] for row in ids]})
    return AdapterTrainer(
        adapted,
        BACKENDS[backend],
        args=args_for_sft(arguments),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def batch() -> dict[str, torch.Tensor]:
    ids = random_ids(3, 24)
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def gradients(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Of all adapters, one behind the other."""
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, adapters)])


@pytest.mark.parametrize("backend", ["fused", "reference", "peft"])
@pytest.mark.parametrize("kind", FORMS)
def test_loss_and_gradients_are_those_of_the_models_own_forward(
    kind: str, backend: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(make(kind), backend, tmp_path, tokenizer)
    form = FORMS[kind][0 if backend == "fused" else 1]
    assert trainer._choice.head.form == form
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss: ")]
    assert len(said) == (form == "own")
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch())
    own = base_of(trainer.adapted)(**batch()).loss  # the same weights, adapter included
    if said:  # naming both figures
        assert f"{type(base_of(trainer.adapted)).__name__}'s own forward gives" in said[0]
    assert loss.item() == pytest.approx(own.item(), rel=2e-6)
    found, expected = gradients(trainer.adapted, loss), gradients(trainer.adapted, own)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["recurrent_gemma", "with term"])
def test_two_accumulated_batches_are_one_of_twice_the_size(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """What a loss has beyond cross entropy is a mean over batches; rows of one length make it that of one batch."""
    losses = []
    for size, accumulated in ((6, 1), (3, 2)):
        trainer = make_trainer(
            make(kind), "fused", tmp_path, tokenizer, per_device_train_batch_size=size, max_steps=1,
            gradient_accumulation_steps=accumulated, learning_rate=1e-3, save_strategy="no",
        )  # fmt: skip
        trainer.train()
        losses.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-5)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("backend", ["fused", "peft"])
def test_a_class_that_is_not_named_for_causal_lm_divides_by_the_tokens_it_predicts_too(
    backend: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The first token of a row is predicted by nothing."""
    model = make("gpt2")
    ids = random_ids(4, 6).tolist()
    trainer = AdapterTrainer(
        attach_adapter(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"]), BACKENDS[backend]),
        BACKENDS[backend], processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        args=args_for_sft(
            SFTConfig(
                output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, logging_steps=1,
                per_device_train_batch_size=4, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
                warmup_steps=0,
            )
        ),
    )  # fmt: skip
    own = make("gpt2")(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize(("kind", "form"), [("llama", "one pass"), ("gpt2", "one pass"), ("halved", "own")])
@pytest.mark.parametrize("how", ["bf16 weights", "bf16 autocast", "fp16 weights"])
def test_in_half_precision_rounding_is_told_from_another_loss(
    kind: str, form: str, how: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    dtype = {"bf16 weights": torch.bfloat16, "fp16 weights": torch.float16}.get(how, torch.float32)
    trainer = make_trainer(make(kind, dtype), "fused", tmp_path, tokenizer, bf16=how == "bf16 autocast")
    assert trainer._choice.head.form == form
    with torch.no_grad(), trainer.compute_loss_context_manager():
        own = base_of(trainer.adapted)(**batch()).loss
        assert trainer.compute_loss(trainer.model, batch()).item() == pytest.approx(own.item(), rel=2e-2)


@pytest.mark.parametrize("backend", ["fused", "peft"])
def test_in_fp64_the_fp32_of_trls_head_is_rounding(
    backend: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = make_trainer(make("llama", torch.float64), backend, tmp_path, tokenizer)
    assert trainer._choice.head.form == FORMS["llama"][0 if backend == "fused" else 1]


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_keeps_the_one_pass_head(
    bits: str, model_dirs: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = load_quantized(model_dirs["llama"], **{bits: True})
    trainer = make_trainer(base, "fused", tmp_path, tokenizer, packing=True)
    assert trainer._choice.head.form == "one pass"


def test_a_base_that_computes_no_loss_is_refused_in_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match="RefusingForCausalLM fails on tokens and labels with this adapter"):
        make_trainer(RefusingForCausalLM(CONFIGS["llama"]()), "fused", tmp_path, tokenizer)


@pytest.mark.parametrize("kind", ["halved", "with term"])
def test_one_line_more_in_an_existing_script_trains_the_models_own_loss(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """An SFTTrainer of a PeftModel, which without the line trains what TRL's head makes of it."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0, target_modules="all-linear")
    ids = random_ids(3, 24).tolist()
    arguments = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, disable_tqdm=True,
        per_device_train_batch_size=3, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    logged = []
    for with_line in (False, True):
        trainer = SFTTrainer(
            get_peft_model(make(kind), lora), args=arguments, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        )  # fmt: skip
        if with_line:
            use_one_pass_head(trainer)
        trainer.train()
        logged.append(trainer.state.log_history[0]["loss"])
    own = make(kind)(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    assert logged[1] == pytest.approx(own, rel=1e-5)
    assert logged[0] != pytest.approx(own, rel=1e-3), "TRL's own head is right as well: this test could not fail"


def test_the_figures_of_an_epoch_are_the_means_of_all_its_steps(tmp_path: Path) -> None:
    logged = []
    for one_pass in (False, True):
        trainer = make_peft_trainer(tmp_path, logging_strategy="epoch", logging_steps=10)
        if one_pass:
            use_one_pass_head(trainer)
        trainer.train()
        logged.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for found, expected in zip(*logged, strict=True):
        assert found.keys() == expected.keys() >= {"entropy", "mean_token_accuracy"}
        assert found["entropy"] == pytest.approx(expected["entropy"], rel=1e-5)


def test_a_head_that_is_trained_goes_through_trls(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make("llama")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = attach_adapter(model, lora, BACKENDS["fused"])
    ids = random_ids(4, 16).tolist()
    arguments = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False
    )
    trainer = AdapterTrainer(
        adapted, BACKENDS["fused"], args=args_for_sft(arguments), processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )  # fmt: skip
    assert trainer._choice.head.form == "TRL"
    trainer.compute_loss(trainer.model, batch()).backward()
    assert model.get_output_embeddings().weight.grad is not None


def train(two_lines: bool, folder: Path) -> list[dict[str, float]]:
    """What an existing script with TRL and PEFT logs, with or without our two lines."""
    trainer = make_peft_trainer(folder)
    if two_lines:
        fuse(trainer.model)
        use_one_pass_head(trainer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_two_lines_more_in_an_existing_script_change_nothing_but_its_speed(tmp_path: Path) -> None:
    ours, theirs = train(True, tmp_path), train(False, tmp_path)
    assert [entry["step"] for entry in ours] == [2, 4]
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    # Of the logged step alone here; TRL's are means over the two steps since the last log.
    assert all(0 < entry["entropy"] < 10 for entry in ours)
