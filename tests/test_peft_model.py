"""Every field of `peft.LoraConfig` through PEFT's own model: the oracle is a plain script of PEFT and TRL."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from plainlora.backends import BACKENDS, attach_adapter, choose_backend, choose_loader
from plainlora.errors import UserError
from plainlora.fast.loss_head import use_own_loss
from plainlora.lora.config import BOOKKEEPING_FIELDS, SUPPORTED_FIELDS
from plainlora.lora.errors import LoRAError
from plainlora.parity.tiny import byte_tokenizer
from plainlora.training.trainers import AdapterTrainer, PredictedTokensCounted, args_for_sft
from tests.conftest import CONFIGS, make_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
BD = {"nblocks": 2, "target_modules_bd_a": ["o_proj", "down_proj"]}
BD["target_modules_bd_b"] = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ON_ALL = {"target_modules": "all-linear"}

# What each field is set to here, and on which models it is trained; elsewhere PEFT refuses it.
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "use_dora": ({"use_dora": True}, ("llama", "gpt2")),
    "pissa": ({"init_lora_weights": "pissa"}, ("llama", "gpt2")),
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, ("llama", "gpt2")),
    "olora": ({"init_lora_weights": "olora"}, ("llama",)),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, ("llama", "gpt2")),
    "eva_config": ({"init_lora_weights": "eva"}, ("llama", "gpt2")),
    "corda_config": ({"init_lora_weights": "corda"}, ("llama", "gpt2")),
    "lora_ga_config": ({"init_lora_weights": "lora_ga", "lora_ga_config": {}}, ("llama", "gpt2")),
    "loftq_config": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}, ()),
    "megatron_config": ({"megatron_config": {"tensor_model_parallel_size": 1}}, ()),
    "trainable_token_indices": ({"trainable_token_indices": [5, 6]}, ("llama", "gpt2", "qwen2")),
    "velora_config": ({"velora_config": {"num_groups": 16}}, ("llama",)),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [7]}, ("llama", "gpt2")),
    "use_qalora": ({"use_qalora": True, "qalora_group_size": 16}, ()),
    "monteclora_config": ({"monteclora_config": {}}, ("llama",)),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, ("llama",)),
    "lora_bias": ({"lora_bias": True}, ("llama", "gpt2")),
    "target_parameters": ({"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, ("mixtral",)),
    "all-linear on experts": (ON_ALL, ("mixtral",)),
    "use_bdlora": ({"use_bdlora": BD}, ("llama",)),
    "arrow_config": ({"arrow_config": {}}, ()),
    "kasa_config": ({"kasa_config": {}}, ("llama",)),
    "ensure_weight_tying": ({"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, ("qwen2",)),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, ("llama",)),
}
TRAINED = [(name, kind) for name, (_, kinds) in CASES.items() for kind in kinds]
REFUSED = [(name, kind) for name, (_, kinds) in CASES.items() for kind in ("llama", "gpt2") if not kinds]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "qwen2": ["q_proj"], "mixtral": ["q_proj"]}


def test_every_field_of_loraconfig_is_known_here() -> None:
    """A field that a newer PEFT adds makes this test fail, so that it gets a case."""
    covered = {name for values, _ in CASES.values() for name in values} | set(CASES)
    parts = {"qalora_group_size"}
    unknown = {field.name for field in fields(LoraConfig)} - SUPPORTED_FIELDS - BOOKKEEPING_FIELDS - covered - parts
    assert not unknown


def base_of(kind: str) -> PreTrainedModel:
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
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], "task_type": "CAUSAL_LM"}
    return LoraConfig(**values | copy.deepcopy(CASES[name][0]))


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
    """TRL's trainer, dividing by the predicted tokens (transformers#46204)."""


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
        if name == "layer_replication":
            continue
        with BACKENDS[backend].disabled(model):
            before = logits_of(model)
        torch.testing.assert_close(before, start, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [each for each in TRAINED if each[0] != "use_dora"])
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
def test_what_peft_refuses_is_one_line(name: str, kind: str) -> None:
    with pytest.raises((UserError, LoRAError)) as caught:
        attach_adapter(base_of(kind), config_of(name, kind), BACKENDS["peft_fused"])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("PEFT refuses this adapter: ", "use_qalora: "))
