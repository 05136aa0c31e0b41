"""Training that goes wrong stops at once, and says what and where."""

import copy
import hashlib
import json
import math
import re
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from trl import SFTConfig, SFTTrainer

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.errors import UserError
from plainlora.interruption import Stopped
from plainlora.run.checkpoints import newest_checkpoint
from plainlora.run.folder import list_checkpoints
from plainlora.settings.arguments import ClassifyConfig
from plainlora.training.trainers import AdapterTrainer, ClassifierTrainer, args_for_sft
from plainlora.training.weight_checks import FirstGradients, check_effect, lora_matrices
from tests.conftest import BACKBONES, make_model
from tests.two_processes import in_two_processes

TEXTS = [f"{name} is number {number}" for number, name in enumerate(("one", "two", "three", "four", "five", "six"), 1)]
TEXTS[4] = "~ is odd"
LAYER = "model.layers.1.self_attn.v_proj"
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def make_trainer(
    folder: Path, tokenizer: PreTrainedTokenizerFast, backend: str = "reference", **options: Any
) -> AdapterTrainer:
    """A trainer of a tiny Llama on the six texts above."""
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    arguments: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none", "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "save_steps": 1, "disable_tqdm": True, "seed": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "packing": False,
    }  # fmt: skip
    torch.manual_seed(1)
    return AdapterTrainer(
        attach_adapter(make_model("llama"), copy.deepcopy(LORA), BACKENDS[backend]),
        BACKENDS[backend],
        args=args_for_sft(SFTConfig(output_dir=str(folder), **(arguments | options))),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}) if "eval_strategy" in options else None,
        processing_class=tokenizer,
    )


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., AdapterTrainer]:
    """`make("fused", max_steps=2, ...)`: such a trainer, whose folder is `name` in the test's own."""

    def make_in(backend: str = "reference", name: str = "run", **options: Any) -> AdapterTrainer:
        return make_trainer(tmp_path / name, tokenizer, backend, **options)

    return make_in


def module_of(trainer: AdapterTrainer, name: str) -> nn.Module:
    """By the end of its name: PEFT puts its own names before."""
    return next(module for full, module in trainer.adapted.named_modules() if full.endswith(name))


def refusal(trainer: AdapterTrainer | ClassifierTrainer) -> str:
    with pytest.raises(UserError) as stopped:
        trainer.train()
    return str(stopped.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_u12_a_layer_that_gets_no_gradient_stops_the_first_step_by_its_name(
    make: Callable[..., AdapterTrainer], backend: str
) -> None:
    trainer = make(backend)
    module_of(trainer, LAYER).register_forward_hook(lambda module, inputs, output: output.detach())
    message = refusal(trainer)
    assert re.search(rf"1 of 14 adapters got no gradient in the first step \(\S*{re.escape(LAYER)}\)", message), (
        message
    )
    assert trainer.state.global_step == 0
    assert list_checkpoints(str(trainer.args.output_dir)) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_u12_a_layer_whose_gradient_is_all_zeros_is_none_that_is_trained(
    make: Callable[..., AdapterTrainer], backend: str
) -> None:
    trainer = make(backend)
    module_of(trainer, LAYER).register_forward_hook(lambda module, inputs, output: output * 0)
    assert LAYER in refusal(trainer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_u12_every_layer_of_an_ordinary_run_is_trained_under_gradient_checkpointing_too(
    make: Callable[..., AdapterTrainer], backend: str
) -> None:
    for checkpointing in (False, True):
        trainer = make(backend, f"run-{checkpointing}", gradient_checkpointing=checkpointing)
        trainer.train()
        layers = lora_matrices(trainer.adapted)
        assert len(layers) == 14
        assert all(bool(layer.lora_B.any()) for layer in layers.values())


class Mover(TrainerCallback):
    """What an optimizer over the wrong weights does."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.weight.mul_(1.001)


def test_u12_a_frozen_weight_that_moves_stops_the_first_step_by_its_name(make: Callable[..., AdapterTrainer]) -> None:
    trainer = make()
    trainer.add_callback(Mover(trainer.adapted.get_parameter("model.embed_tokens.weight")))
    assert "frozen weights changed in the first step (model.embed_tokens.weight)" in refusal(trainer)
    assert list_checkpoints(str(trainer.args.output_dir)) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_u15_an_adapter_that_changes_nothing_is_not_saved(make: Callable[..., AdapterTrainer], backend: str) -> None:
    trainer = make(backend, learning_rate=0.0, save_strategy="no", max_steps=1)
    trainer.train()
    with pytest.raises(
        UserError, match=r"after 1 step 14 of 14 adapters change nothing \(.* and 11 more\), so nothing"
    ):
        trainer.save_model()
    assert not any(Path(str(trainer.args.output_dir)).glob("*"))


def poison(trainer: AdapterTrainer | ClassifierTrainer, tokenizer: PreTrainedTokenizerFast, token: str) -> None:
    """Makes the loss of every row with a token NaN."""
    with torch.no_grad():
        trainer.adapted.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)] = torch.inf


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_u12_a_loss_that_is_not_finite_stops_with_the_step_and_the_rows(
    make: Callable[..., AdapterTrainer], tokenizer: PreTrainedTokenizerFast, packing: bool, accumulated: int
) -> None:
    trainer = make(
        packing=packing, max_length=24 if packing else None, per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulated, max_steps=6,
    )  # fmt: skip
    poison(trainer, tokenizer, "~")
    message = refusal(trainer)
    step = trainer.state.global_step + 1
    assert message.startswith(f"the loss of step {step} is nan, on row")
    assert "5 '~ is odd'" in message
    assert ("row 5 '~ is odd', so" in message) is not packing  # packed, it stands beside others
    kept = newest_checkpoint(str(trainer.args.output_dir))
    assert (f"{kept} is kept" if kept else "nothing had been saved yet") in message
    assert (kept is None) is (step == 1)
    assert "lower learning_rate (now 0.01) or train in float32" in message


@pytest.mark.parametrize("backend", BACKENDS)
def test_u12_a_gradient_that_is_not_finite_stops_before_the_optimizers_step(
    make: Callable[..., AdapterTrainer], backend: str
) -> None:
    """The loss is finite. All rows since the last step may have made the gradient."""
    trainer = make(backend, gradient_accumulation_steps=3)
    layers = lora_matrices(trainer.adapted)
    before = {name: layer.lora_B.detach().clone() for name, layer in layers.items()}
    next(iter(layers.values())).lora_B.register_hook(lambda gradient: gradient * math.inf)
    message = refusal(trainer)
    assert re.match(
        r"the gradient norm of step 1 is (inf|nan), on rows \d '[^']+', \d '[^']+', \d '[^']+' and 3", message
    )
    assert "nothing had been saved yet" in message
    assert all(torch.equal(layer.lora_B, before[name]) for name, layer in layers.items())


def test_u12_a_later_gradient_that_is_not_finite_keeps_the_last_checkpoint(
    make: Callable[..., AdapterTrainer],
) -> None:
    trainer = make()
    weight = next(iter(lora_matrices(trainer.adapted).values())).lora_B
    weight.register_hook(lambda gradient: gradient / 0.0 if trainer.state.global_step == 2 else gradient)
    message = refusal(trainer)
    assert message.startswith("the gradient norm of step 3 is ")
    kept = newest_checkpoint(str(trainer.args.output_dir))
    assert kept is not None
    assert kept.name == "checkpoint-2"
    assert f"{kept} is kept" in message


def test_u12_an_overflow_under_fp16_is_no_fault_and_says_nothing_about_the_layers(
    make: Callable[..., AdapterTrainer],
) -> None:
    """The scaler, which a CPU does without, leaves the step out: the layers are looked at in the next one."""
    trainer = make()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    for layer in lora_matrices(trainer.adapted).values():
        for side in (layer.lora_A, layer.lora_B):
            side.register_hook(torch.zeros_like)
    trainer._gradients = FirstGradients(trainer.adapted)
    for norm, stops in ((math.inf, False), (1.0, True)):
        trainer.training_step(trainer.adapted, next(iter(trainer.get_train_dataloader())), torch.tensor(4))
        with pytest.raises(UserError, match="14 of 14 adapters got no gradient") if stops else nullcontext():
            assert trainer._get_grad_norm(trainer.adapted, grad_norm=torch.tensor(norm)) == norm


def test_u12_a_classifiers_rows_are_named_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    torch.manual_seed(0)
    trainer = ClassifierTrainer(
        AutoModelForSequenceClassification.from_config(BACKBONES["bert"]()),
        None,
        args=ClassifyConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, report_to="none"),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": [0, 1] * 3}),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    poison(trainer, tokenizer, "~")
    message = refusal(trainer)
    assert re.search(r"is nan, on rows (\d '[^']+', )?5 '~ is odd'(, \d '[^']+')?, so training stopped", message), (
        message
    )


def test_u11_weights_that_are_not_finite_are_not_saved(make: Callable[..., AdapterTrainer]) -> None:
    """The loss and the gradient of the first step are finite; its weights are not."""
    trainer = make("peft", learning_rate=1e38, adam_epsilon=1e-45, max_grad_norm=0.0)
    message = refusal(trainer)
    assert re.match(
        r"\S+lora_[AB].default.weight holds values that are not finite, so the model was not saved", message
    )
    assert list_checkpoints(str(trainer.args.output_dir)) == []


def test_u17_a_resumed_run_has_seen_the_rows_of_an_uninterrupted_one(make: Callable[..., AdapterTrainer]) -> None:
    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(Path(str(whole.args.output_dir)) / "checkpoint-2"))
    assert resumed.seen.digest == whole.seen.digest != ""
    other = make(name="other", seed=2)
    other.train()
    assert other.seen.digest != whole.seen.digest


def digest_of_what_the_model_is_given(trainer: AdapterTrainer) -> str:
    """Trains, and takes the digest of the ids that reach the model."""
    given: list[torch.Tensor] = []
    hook = trainer.adapted.register_forward_pre_hook(
        lambda module, inputs, named: given.append(named["input_ids"]), with_kwargs=True
    )
    trainer.train()
    hook.remove()
    digest = ""
    for ids in given:
        digest = hashlib.sha256(digest.encode() + ids.numpy().tobytes()).hexdigest()
    return digest


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("packing", [False, True])
def test_u17_the_digest_of_the_rows_is_that_of_the_ids_that_the_model_is_given(
    make: Callable[..., AdapterTrainer], packing: bool, workers: int
) -> None:
    trainer = make(packing=packing, max_length=24 if packing else None, dataloader_num_workers=workers)
    assert digest_of_what_the_model_is_given(trainer) == trainer.seen.digest != ""


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for a device, where there is one: values that Python is given, and all indices.

    Attributes:
        count: So far.
        at_step: What it was at the end of each optimizer step.
    """

    NAMES = ("item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "masked_select")
    READS = frozenset(
        [*(getattr(torch.Tensor, f"__{name}__") for name in ("bool", "int", "float", "index", "array", "contains")),
         *(getattr(torch.Tensor, name) for name in NAMES), torch.nonzero, torch.equal, torch.masked_select]
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.at_step: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool
        self.count += func in self.READS or by_mask
        return func(*args, **(kwargs or {}))


class CountAtStep(TrainerCallback):
    def __init__(self, reads: HostReads) -> None:
        self.reads = reads

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.reads.at_step.append(self.reads.count)


def reads_in_a_step(trainer: Trainer) -> int:
    """Of the third step: the first is looked at more closely, and the last is."""
    with HostReads() as reads:
        trainer.add_callback(CountAtStep(reads))
        trainer.train()
    return reads.at_step[2] - reads.at_step[1]


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "peft"])
def test_the_host_waits_once_more_in_a_step_than_under_sfttrainer_however_many_batches_it_has(
    make: Callable[..., AdapterTrainer], tokenizer: PreTrainedTokenizerFast, backend: str, accumulated: int
) -> None:
    """Batches are collated in a process of their own, where nothing waits for a device."""
    options = {
        "max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulated,
        "dataloader_num_workers": 1, "logging_strategy": "no", "save_strategy": "no",
    }  # fmt: skip
    ours = make(backend, **options)
    kept = {"report_to": "none", "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True}
    theirs = SFTTrainer(
        make_model("llama"),
        args=SFTConfig(output_dir=str(ours.args.output_dir), logging_nan_inf_filter=False, **kept, **options),
        train_dataset=ours.train_dataset,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(LORA),
    )
    expected = reads_in_a_step(theirs)
    assert expected > accumulated  # TRL's own, of its metrics
    assert reads_in_a_step(ours) == expected + 1


def test_one_process_asks_no_other(make: Callable[..., AdapterTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    monkeypatch.delattr(Accelerator, "gather")
    assert trainer._of_all_processes(torch.tensor(1.5), 15) == [[1.5, 15.0]]


def test_whether_adapters_are_zero_is_read_at_once(make: Callable[..., AdapterTrainer]) -> None:
    trainer = make(max_steps=1)
    trainer.train()
    with HostReads() as reads:
        check_effect(trainer.adapted, 1, 1e-3)
    assert reads.count == 1


class SignalsItself(TrainerCallback):
    """In the second step."""

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "options",
    [
        {"save_strategy": "best"},
        {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True},
    ],
)
def test_what_is_said_to_be_saved_after_a_signal_is_there(
    options: dict[str, Any], make: Callable[..., AdapterTrainer]
) -> None:
    """Also if another checkpoint is the best, and Trainer would keep that one alone, or save no other."""
    trainer = make(
        max_steps=9, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", greater_is_better=True,
        logging_steps=1, **options,
    )  # fmt: skip
    trainer.add_callback(SignalsItself())
    with pytest.raises(Stopped, match=r"stopped after step 2 of 9; .*checkpoint-2 is saved"):
        trainer.train()
    assert trainer.state.best_global_step == 1
    assert [path.name for path in list_checkpoints(trainer.args.output_dir)] == ["checkpoint-1", "checkpoint-2"]
    assert trainer.args.load_best_model_at_end == options.get("load_best_model_at_end", False)


def test_an_epoch_that_a_signal_ends_is_evaluated(make: Callable[..., AdapterTrainer]) -> None:
    """The resumed run begins with the next one. Six rows in batches of three: two steps."""
    options = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 3, "save_strategy": "epoch"}
    trainer = make(eval_strategy="epoch", logging_steps=1, **options)
    trainer.add_callback(SignalsItself())
    with pytest.raises(Stopped, match="stopped after step 2 of 4"):
        trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2]
    saved = json.loads((newest_checkpoint(str(trainer.args.output_dir)) / "trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in saved["log_history"])


def train_together(rank: int, folder: Path) -> tuple[list[str], list[str]]:
    """What ends each of two runs: one row makes the loss of one process NaN, one process is sent a signal.

    Then both digests of a run in which the first process collates for both.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    said = []
    for name in ("poisoned", "signalled"):
        trainer = make_trainer(
            folder / name, tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=9
        )
        if name == "poisoned":
            poison(trainer, tokenizer, "~")
        elif rank == 1:
            trainer.add_callback(SignalsItself())
        try:
            trainer.train()
        except (UserError, Stopped) as stopped:
            said.append(f"{str(stopped) or type(stopped).__name__} at {trainer.state.global_step}")
    together = {"dispatch_batches": True, "split_batches": True}
    trainer = make_trainer(folder / "dispatched", tokenizer, accelerator_config=together)
    return said, [digest_of_what_the_model_is_given(trainer), trainer.seen.digest]


def test_two_processes_stop_together_for_the_loss_or_the_signal_of_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (one, digests), (other, other_digests) = in_two_processes(tmp_path, train_together, tmp_path)
    at_fault, beside = (one, other) if " is nan, " in one[0] else (other, one)
    found = re.match(r"the loss of step (\d) is nan, on row 5 '~ is odd', so .* at (\d)$", at_fault[0])
    assert found, at_fault
    step = int(found[1])
    assert int(found[2]) == step - 1
    elsewhere = r"is [\d.]+ here and not finite in another process, on row \d"
    assert re.match(rf"the loss of step {step} {elsewhere} .* at {step - 1}$", beside[0]), beside
    assert one[1].startswith(f"stopped after step 2 of 9; {tmp_path}/signalled/checkpoint-2 is saved; ")
    assert other[1] == "Stopped at 2"
    assert digests[0] == digests[1] != other_digests[0] == other_digests[1]
