"""Writes tensors into a GGUF file one at a time, and reads them again to compare them with what was meant.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from plainlora.errors import UserError

Quantization = Literal["f16", "q8_0", "q4_0", "q4_1"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

# Of llama.h: what `general.file_type` says of most tensors.
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7}

# Largest error of a value, divided by the largest of its block of 32 (of f16: by itself). A step of q8_0 is 1/127 of
# that, of q4_0 1/8 with the opposite end cut off, of q4_1 1/15 of the block's range; and a step is itself an f16.
WORST = {
    Type.F32: 0.0,
    Type.F16: 2**-11,
    Type.Q8_0: 1 / 254 + 2**-11,
    Type.Q4_0: 1 / 8 + 2**-8,
    Type.Q4_1: 1 / 15 + 2**-8,
}
SMALLEST_F16 = 2.0**-25  # half of the smallest subnormal: values below round to 0
BLOCK = 32
PLAIN: dict[Type, np.dtype[Any]] = {Type.F32: np.dtype(np.float32), Type.F16: np.dtype(np.float16)}
ROWS = 4096  # compared at a time


def type_for(name: str, shape: tuple[int, ...], quantization: Quantization | Literal["f32"]) -> Type:
    """The type of a tensor in a file.

    Vectors and GPT-2's position embeddings stay in f32, as ggml adds them in f32. With 4 bits the embeddings and the
    head have 8. A row that blocks of 32 do not divide stays in f16.
    """
    if len(shape) < 2 or quantization == "f32" or name.startswith("position_embd"):
        return Type.F32
    if quantization == "f16" or shape[-1] % BLOCK:
        return Type.F16
    if name in ("token_embd.weight", "output.weight"):
        return Type.Q8_0
    return Type[quantization.upper()]


def encode(tensor: torch.Tensor, kind: Type) -> np.ndarray:
    """The bytes or numbers of a tensor in one of ggml's types."""
    return gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), kind)


def write_gguf(
    path: Path,
    arch: str,
    describe: Callable[[gguf.GGUFWriter], None],
    tensors: Mapping[str, torch.Tensor],
    quantization: Quantization | Literal["f32"],
) -> None:
    """Writes a file. At most one tensor is converted at a time.

    Args:
        path: The file.
        arch: `general.architecture`.
        describe: Writes the other keys.
        tensors: By their names in the file, with the shapes of torch: `(d_out, d_in)`.
        quantization: The type of its matrices; see `type_for`.

    Raises:
        UserError: A value is too large for f16.
    """
    writer = gguf.GGUFWriter(path, arch)
    try:
        describe(writer)
        writer.add_file_type(FILE_TYPES[quantization])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        kinds = {name: type_for(name, tuple(tensor.shape), quantization) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            shape = gguf.quants.quant_shape_to_byte_shape(tuple(tensor.shape), kinds[name])
            plain = PLAIN.get(kinds[name])
            dtype = np.dtype(np.uint8) if plain is None else plain
            writer.add_tensor_info(
                name,
                shape if plain is None else tuple(tensor.shape),
                dtype,
                int(np.prod(shape)),
                raw_dtype=kinds[name],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            with np.errstate(over="ignore"):
                values = encode(tensor, kinds[name])
            if kinds[name] == Type.F16 and not np.isfinite(values).all():
                raise UserError(
                    f"{name} holds values beyond f16, the largest of which is 65504; it cannot be exported"
                )
            writer.write_tensor_data(values)
    finally:
        writer.close()


def read_fields(path: Path) -> dict[str, object]:
    """The keys of a file and their values."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def read_tensors(path: Path) -> Iterator[tuple[str, Type, torch.Tensor]]:
    """Name, type and values of each tensor of a file, in the shapes of torch."""
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, tensor.tensor_type, torch.from_numpy(np.array(values, dtype=np.float32))


def check_written(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Reads a file again, and compares every value in fp64 with what it was rounded from.

    Returns:
        For each type in the file the largest error of a value, divided by the largest value of its block.

    Raises:
        UserError: A tensor is missing, or a value is further off than its type rounds.
    """
    left = dict(tensors)
    errors: dict[str, float] = {}
    for name, kind, found in read_tensors(path):
        meant = left.pop(name, None)
        if meant is None or meant.shape != found.shape:
            raise UserError(f"{path.name} read again: {name} is not as it was written; export again")
        worst = max(map(partial(_worst, kind), meant.split(ROWS), found.split(ROWS)), default=0.0)
        if not worst <= WORST[kind]:
            raise UserError(
                f"{path.name} read again: {name} is off by {worst:.1e} of its block, and {kind.name} rounds by "
                f"at most {WORST[kind]:.1e}; nothing was written"
            )
        errors[kind.name] = max(errors.get(kind.name, 0.0), worst)
    if left:
        raise UserError(f"{path.name} read again: {next(iter(left))} is missing; nothing was written")
    return errors


def _worst(kind: Type, meant: torch.Tensor, found: torch.Tensor) -> float:
    """The largest error of a value, divided by the largest of its block, beside what every f16 may lose."""
    expected = meant.detach().double()
    blocks = expected.abs().reshape(-1, 1 if kind in (Type.F32, Type.F16) else BLOCK)
    error = (found.double() - expected).abs().reshape(blocks.shape) - SMALLEST_F16 * (kind != Type.F32)
    return float((error.clamp(min=0) / blocks.amax(-1, keepdim=True).clamp(min=1e-300)).max())
