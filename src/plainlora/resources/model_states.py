"""Memory that does not depend on the batch: weights, adapter, gradients and the optimizer's state.

These are the "model states" of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1). A base in 4 or 8 bits
adds the one weight that is made dense.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from plainlora.errors import UserError, first_line
from plainlora.resources.plan import Plan
from plainlora.resources.weights import count_bytes, quantized_weights, weight_bytes
from plainlora.settings.arguments import optim_name


@dataclass(frozen=True)
class ModelStates:
    """Bytes of one process.

    Attributes:
        weights: The frozen base as the run stores it, or the whole model if its own weights are trained.
        adapters: The weights trained beside the base.
        gradients: The gradients of all trained weights.
        optimizer: The optimizer's state.
        initial: A copy of the initial weights, kept on the CPU if the model's own weights are trained.
        dense: The largest quantised weight in the base's dtype, because one at a time is made dense.
        beside_step: The sum of what is held beside a step's tensors. A step makes the gradients itself, so they count
            here only if they are accumulated from earlier batches.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    initial: int
    dense: int
    beside_step: int


def count_model_states(plan: Plan, base: PreTrainedModel, model: PreTrainedModel) -> ModelStates:
    """Adds up what one process holds beside a step.

    Args:
        plan: The run.
        base: Its base, on the `meta` device.
        model: The base as it is trained, with its adapter if there is one.

    Raises:
        UserError: The optimizer cannot be made here.
    """
    quantized = {} if plan.quantization is None else quantized_weights(base, plan.quantization, plan.dtype)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, optimizer = count_bytes(trainable), optimizer_bytes(plan.training, trainable)
    weights = weight_bytes(base, plan.quantization, plan.dtype)
    adapters = count_bytes(model.parameters()) - count_bytes(base.parameters())
    initial = 0 if plan.lora is not None else gradients
    dense = max((parameter.numel() for parameter in quantized.values()), default=0) * plan.dtype.itemsize
    beside_step = weights + adapters + optimizer + dense
    beside_step += gradients if plan.training.gradient_accumulation_steps > 1 else 0
    beside_step += initial if plan.device.type == "cpu" else 0
    return ModelStates(
        weights=weights,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        initial=initial,
        dense=dense,
        beside_step=beside_step,
    )


def optimizer_bytes(training: TrainingArguments, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the state that `training.optim` keeps, made by the optimizer's own code on the `meta` device.

    Args:
        training: The arguments, with `optim`.
        parameters: The weights that it trains, on any device.

    Raises:
        UserError: It cannot be made here: a package is missing, or it cannot make its state on the `meta` device.
    """
    shapes = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    if not shapes:
        return 0
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training)
        optimizer = kind(shapes, **{name: value for name, value in options.items() if name != "fused"})
        if hasattr(optimizer, "init_state"):  # bitsandbytes', whose steps need values; paged state has the same size
            optimizer.is_paged = False
            for index, parameter in enumerate(shapes):
                optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        else:
            for parameter in shapes:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
    except Exception as error:  # of many libraries
        reason = first_line(error)
        raise UserError(f"optim {optim_name(training)}: it cannot be made here ({reason}); choose another") from error
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    return sum({tensor.untyped_storage()._cdata: tensor.nbytes for tensor in state}.values())
