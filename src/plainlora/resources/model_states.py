"""What a run holds whatever the batch: weights, what is trained, its gradients, the optimizer's state.

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
        weights: Of the frozen base, or of the whole model where its own weights are trained, as the run stores it.
        adapters: What is trained beside the base.
        gradients: Of all that is trained.
        optimizer: State of the optimizer.
        initial: A copy of the trained weights as they were, kept on the CPU where the model's own are trained.
        dense: Of the largest quantised weight in the type of the base: one at a time is made dense.
        beside_step: What stands beside the tensors that a step makes, which are its gradients too unless they are
            accumulated: then they stand from the step before.
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
        model: The same with what is trained.

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
        training: Which optimizer.
        parameters: What it trains, of any device.

    Raises:
        UserError: It cannot be made here: a package is missing, or it makes no state without values.
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
