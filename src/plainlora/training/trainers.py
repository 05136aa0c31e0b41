"""Trainer overrides for models with an adapter that are not a PeftModel, each with its upstream link."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from plainlora.backends import Backend
from plainlora.errors import UserError
from plainlora.fast.documents import use_documents
from plainlora.fast.isolation import isolation_of
from plainlora.fast.loss_head import base_of, evaluating, use_own_loss
from plainlora.lora.errors import some
from plainlora.run.checkpoints import past_the_end
from plainlora.run.folder import weight_files
from plainlora.training.batching import check_isolation
from plainlora.training.classifier_loss import RowEvaluation
from plainlora.training.evaluation_loss import TokenEvaluation
from plainlora.training.last_batch import TrainsRowsOnce
from plainlora.training.loraplus import WithLoRAPlus
from plainlora.training.saving import AtomicSaves
from plainlora.training.watching import Watched
from plainlora.training.weight_checks import check_effect, check_values


@contextmanager
def accepted_as_adapter_model(model: nn.Module) -> Iterator[None]:
    """Makes Trainer accept a quantised base that carries adapters but is not a PeftModel.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer_utils.py
    (`validate_quantization_for_training`)
    """
    model.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        del model.__dict__["_hf_peft_config_loaded"]


@contextmanager
def adapter_precision_kept(model: nn.Module) -> Iterator[None]:
    """Undoes SFTTrainer's cast of every trainable weight of a quantised model to bf16, which rounds A.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py ("When using QLoRA, ...")
    """
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in before:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


class LengthGroupedByEpoch(Sampler[int]):
    """A `LengthGroupedSampler` whose order depends on the seed and the epoch alone.

    Transformers' draws from PyTorch's global random stream. If dropout has made the streams of processes diverge, they
    train in different orders: of 64 rows on two processes, 8 were never seen in the second epoch and 8 were seen
    twice. A resumed run has another order than an uninterrupted one. transformers#48025 fixes this for evaluation.
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer_pt_utils.py
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)


class RowsInOrder(Trainer):
    """Trainer that groups rows by length with `LengthGroupedByEpoch`."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """As Trainer's, except for length grouping."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return LengthGroupedByEpoch(sampler, seed, lambda: int(self.state.epoch or 0))
        return sampler


class PredictedTokensCounted(Trainer):
    """Trainer that divides a language model's loss by the number of predicted tokens.

    The first label of a row is never predicted, but Transformers excludes it from the count only if the model's class
    is named `...ForCausalLM`. GPT-2's is not: the loss of rows of 16 tokens was 6 % too small (transformers#46204).
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer.py (`_loss_shifts_labels`)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss_shifts_labels = True


class _TrainerOverrides(AtomicSaves, Watched, RowsInOrder, WithLoRAPlus):
    """The overrides of both trainers.

    Args:
        model: A model from `attach_adapter`, or a base whose own weights are trained.
        backend: The adapter's back end; `None` without an adapter, when the model is saved and loaded whole.
        loraplus_lr_ratio: See `WithLoRAPlus`.
        *args: Arguments of the trainer.
        **kwargs: Arguments of the trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend | None,
        *args: Any,
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.backend, self.adapted, self.saves_all = backend, model, backend is None
        self._evaluated: tuple[int | None, EvalLoopOutput | None] = None, None  # step and result
        self._reloaded: int | None = None  # the step whose weights were loaded as the best
        if kwargs["args"].fp16:
            trained_in_float32(model)
        with accepted_as_adapter_model(model), adapter_precision_kept(model):
            super().__init__(cast(PreTrainedModel, model), *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Takes no step if none is left, or if the run had stopped early.

        Trainer takes one more when it resumes a run's last checkpoint.

        https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer.py (`_inner_training_loop`
        compares with `max_steps` only after a step)
        """
        step, end = self.state.global_step, self.state.max_steps
        if step > end:
            raise past_the_end("the checkpoint", step, end)
        if step < end and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def load_adapter(self, checkpoint: str) -> None:
        """Loads a checkpoint's adapter, or its whole model, into the model, whose trained weights are whole."""
        if self.backend is None:
            for file in weight_files(checkpoint):
                loaded = self.adapted.load_state_dict(load_file(file), strict=False)  # a tied weight is saved once
                if loaded.unexpected_keys:  # a model that Transformers saves under other names than it trains
                    raise UserError(
                        f"resume_from_checkpoint: {file} holds {some(loaded.unexpected_keys)}, which this model does "
                        "not name; start anew in another --output_dir"
                    )
        else:
            self.backend.reload(self.adapted, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As `load_adapter`. Trainer would look for a whole model, because this is not a PeftModel."""
        self.load_whole(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's; an optimizer state of other weights is reported in one line."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"resume_from_checkpoint: the optimizer in {checkpoint} is not one for this run's weights ({error}); "
                "give the settings that the checkpoint was written with"
            ) from error

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's; keeps the result of `evaluate` for `last_evaluation`."""
        outcome = super().evaluation_loop(*args, **kwargs)
        if kwargs.get("metric_key_prefix", "eval") == "eval":
            self._evaluated = self.state.global_step, outcome
        return outcome

    def last_evaluation(self) -> EvalLoopOutput | None:
        """The result of an evaluation of the final weights; `None` if there was none at the last step.

        It is not valid if another step's weights were loaded since, or if `bf16_full_eval` is set, for which Trainer
        casts the weights after training only.
        """
        cast_now = self.args.bf16_full_eval or self.args.fp16_full_eval
        step, outcome = self._evaluated
        return outcome if step == self.state.global_step and not cast_now else None

    def _load_best_model(self) -> None:
        """As `load_adapter`, for `load_best_model_at_end`."""
        if self.state.best_global_step != self.state.global_step:
            self._evaluated, self._reloaded = (None, None), self.state.best_global_step
        self.load_whole(str(self.state.best_model_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves, unless a trained weight is not finite or, at the end, an adapter has no effect."""
        with self.engine.whole():
            check_values(self.adapted)
            if output_dir is not None or self.backend is None:
                super().save_model(output_dir, _internal_call)
                return
            check_effect(self.adapted, self.state.global_step, self.args.learning_rate, self._reloaded)
            with self.backend.for_unchanged_base(self.adapted):
                super().save_model(output_dir, _internal_call)


class AdapterTrainer(_TrainerOverrides, PredictedTokensCounted, TokenEvaluation, TrainsRowsOnce):
    """SFTTrainer for a model with an adapter of any back end, or for its own weights."""

    def __init__(self, model: nn.Module, backend: Backend | None, *args: Any, **kwargs: Any) -> None:
        self._rows, self._examined = kwargs["train_dataset"], False
        super().__init__(model, backend, *args, **kwargs)
        self._choice = use_own_loss(self, one_pass=backend is not None and backend.fast)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # these compute only after Trainer has wrapped it
            self._examine_base(model)

    def _examine_base(self, model: nn.Module) -> None:
        """Chooses the loss head, and checks that the model keeps the rows of a batch apart.

        Args:
            model: The model as the trainer calls it.

        Raises:
            UserError: The model cannot be trained on rows batched in this way.
        """
        self._examined, base = True, base_of(self.adapted)
        if self.args.gradient_checkpointing and not base.supports_gradient_checkpointing:
            raise UserError(f"gradient_checkpointing: {type(base).__name__} does not support it; set it to false")
        self._choice.make(model, max(self._rows[:64]["input_ids"], key=len))
        sizes = {"train": self.args.per_device_train_batch_size}
        if self.eval_dataset is not None:
            sizes["eval"] = self.args.per_device_eval_batch_size
        batches = [f"per_device_{name}_batch_size" for name, size in sizes.items() if size > 1]
        packed = "packing" if cast(SFTConfig, self.args).packing else "padding_free"
        with evaluating(model), self.compute_loss_context_manager():
            isolation = isolation_of(self, model)
            if self.backend is not None and self.backend.fast:
                use_documents(self, isolation)
            check_isolation(isolation, type(base).__name__, packed if self.padding_free else None, batches)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As `EngineTrainer`'s; examines a sharded base, which can compute only now, before a batch is collated."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if not self._examined:
            self._examine_base(self.model_wrapped)
        return prepared

    def training_rows(self) -> list[list[int]]:
        """The rows before SFTTrainer packed them."""
        return list(self._rows["input_ids"])

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, without TRL's model card: this project writes its own at the end."""
        super(SFTTrainer, self)._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the perplexity, exp(loss), with every evaluation loss."""
        for prefix in ("eval", "base"):
            if (loss := logs.get(f"{prefix}_loss")) is not None:
                logs[f"{prefix}_perplexity"] = math.exp(min(loss, 700.0))
        super().log(logs, start_time)


class ClassifierTrainer(_TrainerOverrides, RowEvaluation, TrainsRowsOnce):
    """Trainer for a sequence classifier with an adapter of any back end, or for its own weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A classifier accepts num_items_in_batch and ignores it. Trainer would treat the loss as already scaled, and
        # multiply it by the number of processes and of accumulated batches (transformers#47688).
        self.model_accepts_loss_kwargs = False


ArgumentsT = TypeVar("ArgumentsT", bound=TrainingArguments)


def on_one_device(args: ArgumentsT) -> ArgumentsT:
    """Makes a process train on one device only.

    Otherwise Trainer multiplies the batch size by the number of visible GPUs and wraps the model in `nn.DataParallel`,
    whose copies use the first copy's weights wherever a module's `forward` was replaced.
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/training_args.py (`_setup_devices`)
    """
    args._n_gpu = min(args.n_gpu, 1)
    return args


def trained_in_float32(model: nn.Module) -> None:
    """Makes every trained weight float32, as loss scaling needs it: `GradScaler` refuses half-precision gradients.

    Adapters are in float32 already; heads, biases and whole models have the base's dtype.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/amp/grad_scaler.py (`_unscale_grads_`)
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def args_for_trainer(args: ArgumentsT) -> ArgumentsT:
    """A copy of the arguments for Trainer, with some features switched off.

    - Pushing: Trainer would publish pickles and the optimizer's state; see `plainlora.hub.pushing`.
    - DistributedDataParallel's search for unused weights: the first step's gradients are checked instead.
    - The filter of losses that are not finite: it makes the host wait for each batch, and `Watched` stops the run.
    - Pinned memory on a CPU, of which PyTorch warns.
    """
    handed = on_one_device(copy.copy(args))
    handed.push_to_hub, handed.hub_token = False, None
    if handed.ddp_find_unused_parameters is None:
        handed.ddp_find_unused_parameters = False
    handed.logging_nan_inf_filter = False
    if handed.device.type == "cpu":
        handed.dataloader_pin_memory = False
    return handed


def args_for_sft(args: SFTConfig) -> SFTConfig:
    """A copy of the arguments for SFTTrainer, without the preparation of tokenizer and rows, which is already done.

    SFTTrainer uses rows with `input_ids` and `labels` unchanged. Packing still needs `max_length`.
    """
    handed = args_for_trainer(args)
    handed.chat_template_path = handed.pad_token = handed.model_init_kwargs = None
    handed.assistant_only_loss = False
    if not handed.packing:
        handed.max_length = None
    return handed
