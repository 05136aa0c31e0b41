"""Where the time of one iteration goes, by kind of operation."""

import torch

# Kind: beginnings of the names of PyTorch's operators. The first that fits counts.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "softmax and cross entropy": (
        "aten::_log_softmax", "aten::_softmax", "aten::log_softmax", "aten::softmax", "aten::logsumexp", "aten::exp",
        "aten::gather", "aten::scatter", "aten::argmax", "aten::amax", "aten::max", "aten::nll_loss", "aten::where",
    ),
    "activations": ("aten::gelu", "aten::tanh", "aten::pow", "aten::silu", "aten::sigmoid"),
    "norms": ("aten::native_layer_norm", "aten::native_batch_norm", "aten::rsqrt", "aten::mean"),
    "dropout": ("aten::bernoulli", "aten::native_dropout", "aten::dropout"),
    "copies and casts": ("aten::copy_", "aten::clone", "aten::cat", "aten::contiguous", "aten::_to_copy", "aten::to"),
    "sums and products of elements": ("aten::add", "aten::mul", "aten::sub", "aten::div", "aten::sum", "aten::neg"),
}  # fmt: skip
OTHER = "all else"


def kind_of(operator: str) -> str:
    """`aten::addmm_` -> `matrix products`."""
    return next((kind for kind, names in KINDS.items() if operator.startswith(names)), OTHER)


def sort_operations(profile: torch.profiler.profile, device: str, seconds: float) -> dict[str, float]:
    """Seconds of each kind, of operators alone; what is left of the iteration's time is `OTHER`."""
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in profile.key_averages():
        micro = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if (kind := kind_of(event.key)) != OTHER:
            found[kind] += micro / 1e6
    found[OTHER] = max(seconds - sum(found.values()), 0.0)
    return found
