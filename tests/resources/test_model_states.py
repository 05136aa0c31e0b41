"""What stands in memory beside a step is what a real model, its scales and a real optimizer hold."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import Trainer

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.resources.model_states import count_model_states, optimizer_bytes
from plainlora.resources.weights import stored_quantization
from tests.conftest import CONFIGS, load_quantized
from tests.resources.plans import LORA, make_plan, settings
from tests.resources.test_weights import QUANTIZATIONS, real_bytes

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "paged_adamw_32bit", "adamw_8bit", "lion_32bit", "sgd", "adafactor")


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_bytes_of_the_optimizer_are_those_of_its_state(optim: str, tmp_path: Path) -> None:
    training = settings(tmp_path, optim=optim)
    parameters = [torch.nn.Parameter(torch.ones(*shape)) for shape in ((300, 100), (64, 64), (10,))]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(training)
    optimizer = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    real = sum({tensor.data_ptr(): tensor.nbytes for tensor in state}.values())
    assert optimizer_bytes(training, parameters) == real
    assert (real > 0) == (optim != "sgd")


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", ["NF4", "NF4 double"])
def test_the_bytes_beside_a_step_are_those_of_a_real_model_in_nf4(
    name: str, accumulated: int, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    training = settings(tmp_path, gradient_accumulation_steps=accumulated)
    stored = {"load_in_4bit": True, "use_bnb_nested_quant": name == "NF4 double"}
    plan = make_plan(CONFIGS["llama"](), training, model=stored)
    counted = count_model_states(plan, *plan.build())

    real = load_quantized(model_dirs["llama"], **QUANTIZATIONS[name])
    states = [parameter.quant_state for parameter in real.parameters() if hasattr(parameter, "quant_state")]
    assert counted.weights == real_bytes(real)
    dense = [
        dequantize_4bit(parameter.data, parameter.quant_state).nbytes
        for parameter in real.parameters()
        if hasattr(parameter, "quant_state")
    ]
    assert len(states) == 14
    assert counted.dense == max(dense)
    attach_adapter(real, LORA, BACKENDS["fused"])
    trained = [parameter for parameter in real.parameters() if parameter.requires_grad]
    adapters = sum(parameter.nbytes for parameter in trained)
    assert counted.adapters == counted.gradients == adapters
    parts = real_bytes(real) + max(dense) + optimizer_bytes(training, trained)
    assert counted.beside_step == parts + (adapters if accumulated > 1 else 0)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_loaded_models_quantization_is_found_in_its_config_and_in_its_checkpoints(
    name: str, model_dirs: dict[str, Path]
) -> None:
    config = load_quantized(model_dirs["llama"], **QUANTIZATIONS[name]).config
    found = stored_quantization(config)
    assert found is not None
    config.quantization_config = config.quantization_config.to_dict()
    again = stored_quantization(config)
    assert again is not None
    for option, value in QUANTIZATIONS[name].items():
        assert getattr(found, option) == getattr(again, option) == value
    assert stored_quantization(CONFIGS["llama"]()) is None
