"""Writes the GGUF file of an adapter, or of the model merged with it, and keeps it if llama.cpp reads it right.

The file is read again by the `gguf` package and compared with what was meant. Where `llama-cpp-python` is installed,
it answers beside Transformers, and the certificate has the figures; elsewhere the certificate says that it has not.
"""

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
from accelerate.utils import release_memory
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from plainlora.adapters.output import check_output
from plainlora.base.config import check_mergeable, load_config
from plainlora.errors import UserError
from plainlora.export.adapter_tensors import COPY, adapter_tensors, describe_adapter, read_exportable
from plainlora.export.families import Layout
from plainlora.export.gguf_file import Quantization, check_written, write_gguf
from plainlora.export.ollama import modelfile
from plainlora.export.proof import Reference, ask_transformers, find_llama_cpp, prove
from plainlora.export.servers import Served, describe_servers
from plainlora.export.vocabulary import Vocabulary, read_vocabulary
from plainlora.folders import check_disk, sha256_of, staged
from plainlora.lora.delta import Delta, read_deltas
from plainlora.lora.errors import LoRAError
from plainlora.lora.interchange import read_config
from plainlora.merging.certificate import hash_adapter
from plainlora.report import package_versions, write_json
from plainlora.run.adapter_base import Base, class_labels, find_base, load_base_of, load_tokenizer_of

CERTIFICATE = "export.json"
COSTS: tuple[Quantization, ...] = ("q8_0", "q4_0")  # measured beside f16, whichever is kept
WIDTHS = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_1": 20 / 32}  # bytes of a value


@dataclass(frozen=True)
class ExportResult:
    """The result of `export_gguf`.

    Attributes:
        file: The GGUF file.
        files: Every file of the folder, by name.
        certificate: The content of `export.json`.
        warnings: Warnings for the user.
    """

    file: Path
    files: list[str]
    certificate: dict[str, Any]
    warnings: list[str]


def _describe_model(layout: Layout, vocabulary: Vocabulary, writer: gguf.GGUFWriter) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    layout.describe(writer)
    vocabulary.describe(writer)


def _model_tensors(model: PreTrainedModel, layout: Layout) -> dict[str, torch.Tensor]:
    """The weights as they stand in the file. Tied ones are one parameter."""
    laid_out = (layout.laid_out(name, parameter.detach()) for name, parameter in model.named_parameters())
    return dict(laid_out) | layout.extra_tensors()


def _stops(base: Base) -> list[int]:
    """The tokens at which the base's answers end, by its generation config."""
    try:
        ends = GenerationConfig.from_pretrained(base.name, revision=base.revision or "main").eos_token_id
    except OSError:  # it has none
        return []
    return list(ends) if isinstance(ends, list) else [ends] if ends is not None else []


def _write_model(
    path: Path, tensors: Mapping[str, torch.Tensor], layout: Layout, vocabulary: Vocabulary, quantization: Quantization
) -> dict[str, float]:
    write_gguf(path, layout.arch, lambda writer: _describe_model(layout, vocabulary, writer), tensors, quantization)
    return check_written(path, tensors)


def _served(adapter: Path, base: Base, layout: Layout) -> Served:
    config = read_config(adapter)
    deltas: Mapping[str, Delta] | None
    try:
        deltas, others = read_deltas(adapter)
    except LoRAError:  # of a variant, which the servers do not take either
        deltas, others = None, []
    others = [name for name in others if not name.endswith(COPY)]
    layers = int(layout.config.num_hidden_layers)
    revision = None if base.revision in (None, "main") else base.revision
    return Served(adapter, base.name, layout.config.model_type, layers, config, deltas, tuple(others), revision)


def export_gguf(
    adapter: str | Path,
    output: str | Path,
    merged: bool = False,
    quantization: Quantization = "f16",
    *,
    base_model: str | None = None,
    allow_other_base: bool = False,
) -> ExportResult:
    """Exports an adapter to GGUF. The output is written only if all that can be checked here holds.

    Args:
        adapter: Folder of the adapter, with its tokenizer.
        output: New folder for the file, its certificate and the servers' commands.
        merged: Whether the whole merged model is written, rather than the adapter alone.
        quantization: The type of the matrices of a merged model; an adapter's are f32.
        base_model: See `plainlora.run.adapter_base.find_base`.
        allow_other_base: See `plainlora.run.adapter_base.find_base`.

    Raises:
        UserError: The base cannot be loaded or is another one, llama.cpp cannot have what was trained or would read
            the tokenizer otherwise, or what it reads differs from Transformers.
        LoRAError: The adapter cannot be read or does not fit the base.
    """
    adapter, output = Path(adapter), Path(output)
    check_output(output, [str(adapter)])
    output = output.resolve()  # `.` cannot be renamed
    base = find_base(adapter, base_model, allow_other_base)
    if class_labels(adapter) is not None:
        raise UserError(
            f"{adapter} is a classifier's adapter, and llama.cpp's models here answer in text; use predict"
        )
    config = load_config(base.name, base.revision)
    check_mergeable(base.name, config)
    layout = Layout(base.name, config)
    deltas = None if merged else read_exportable(adapter, layout)
    tokenizer = load_tokenizer_of(adapter, base)
    vocabulary = read_vocabulary(tokenizer, int(config.vocab_size), _stops(base))
    with staged(output) as scratch:
        work = _Work(adapter, base, layout, tokenizer, vocabulary, scratch)
        file, found = work.merged(quantization) if deltas is None else work.adapter_alone(deltas)
        files = work.write_servers(file, merged)
        certificate = work.certificate(file, found)
        write_json(scratch / CERTIFICATE, certificate)
    warnings = [*([base.warning] if base.warning else []), *vocabulary.notes]
    return ExportResult(output / file.name, [file.name, CERTIFICATE, *files], certificate, warnings)


@dataclass(frozen=True)
class _Work:
    """One export into a folder that does not have its name yet."""

    folder: Path
    base: Base
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    scratch: Path

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def load(self, written: Sequence[Quantization]) -> PreTrainedModel:
        """The base in fp32, as whatever is rounded is to be rounded once.

        Args:
            written: The types of the files that are written of it, for which there must be room.
        """
        model = load_base_of(self.folder, self.base, "16bit", torch.float32)
        size = sum(parameter.numel() for parameter in model.parameters())
        needed = int(size * sum(WIDTHS[kind] for kind in written))
        check_disk(self.scratch.parent, needed, f"the export of {self.folder}")
        return model

    def adapter_alone(self, deltas: Mapping[str, Delta]) -> tuple[Path, dict[str, Any]]:
        """Writes the adapter's file, and lets llama.cpp add it to files of the base."""
        file = self.scratch / f"{self.name}-lora.gguf"
        alpha, tensors = adapter_tensors(deltas, self.layout)
        write_gguf(file, self.layout.arch, lambda writer: describe_adapter(writer, alpha), tensors, "f32")
        found: dict[str, Any] = {
            "type": "f32",
            "alpha": alpha,
            "rounding": check_written(file, tensors),
            "proof": None,
        }
        if find_llama_cpp():
            kinds = ("f16", *COSTS)
            reference = ask_transformers(self.base.backend.load(self.load(kinds), self.folder), self.tokenizer)
            release_memory()
            with tempfile.TemporaryDirectory(dir=self.scratch, prefix="base.") as folder:
                base = _model_tensors(self.load(kinds), self.layout)
                files = {kind: Path(folder) / f"base-{kind}.gguf" for kind in kinds}
                for kind, path in files.items():
                    _write_model(path, base, self.layout, self.vocabulary, kind)
                del base
                release_memory()
                found["proof"] = self._prove(files, file, reference)
        return file, found

    def merged(self, quantization: Quantization) -> tuple[Path, dict[str, Any]]:
        """Writes the merged model's file, and lets llama.cpp answer with it."""
        file = self.scratch / f"{self.name}-{quantization}.gguf"
        kinds = dict.fromkeys((quantization, *(("f16", *COSTS) if find_llama_cpp() else ())))
        model = self.base.backend.load(self.load(list(kinds)), self.folder)
        reference = ask_transformers(model, self.tokenizer) if find_llama_cpp() else None
        tensors = _model_tensors(self.base.backend.merge(model), self.layout)
        del model
        rounding = _write_model(file, tensors, self.layout, self.vocabulary, quantization)
        found: dict[str, Any] = {"type": quantization, "rounding": rounding, "proof": None}
        if reference is not None:
            with tempfile.TemporaryDirectory(dir=self.scratch, prefix="others.") as folder:
                files = {kind: Path(folder) / f"{kind}.gguf" for kind in kinds} | {quantization: file}
                for kind, path in files.items():
                    if kind != quantization:
                        _write_model(path, tensors, self.layout, self.vocabulary, kind)
                del tensors
                release_memory()
                found["proof"] = self._prove(files, None, reference)
        return file, found

    def _prove(self, files: dict[Quantization, Path], lora: Path | None, reference: Reference) -> dict[str, Any]:
        return prove(files, lora, reference, self.layout.context, self.vocabulary)

    def write_servers(self, file: Path, merged: bool) -> list[str]:
        """Writes the commands of the servers, and the Modelfile if there can be one; returns their names."""
        served = _served(self.folder, self.base, self.layout)
        template = (self.folder / "chat_template.jinja").is_file()
        text = describe_servers(served, template)
        create = f"ollama create {shlex.quote(self.name)} -f Modelfile"
        if merged:
            llama = f"llama-server --jinja --model {shlex.quote(file.name)}"
            written = modelfile(f"./{file.name}", None, self.tokenizer, create)
        else:
            llama = f"llama-server --jinja --model BASE.gguf --lora {shlex.quote(file.name)}"
            if template:
                llama += f" --chat-template-file {shlex.quote(f'{self.folder.resolve()}/chat_template.jinja')}"
            comment = f"BASE.gguf is a GGUF of {self.base.name}; then {create}"
            written = modelfile("./BASE.gguf", f"./{file.name}", self.tokenizer, comment)
        text += f"# llama.cpp:\n{llama}\n"
        if written is None:
            text += "\n# Ollama: the chat template depends on more than the roles, which a Modelfile cannot tell.\n"
        else:
            text += f"\n# Ollama, whose template is in the Modelfile:\n{create}\n"
            (self.scratch / "Modelfile").write_text(written, encoding="utf-8")
        (self.scratch / "servers.txt").write_text(text, encoding="utf-8")
        return ["servers.txt", *([] if written is None else ["Modelfile"])]

    def certificate(self, file: Path, found: dict[str, Any]) -> dict[str, Any]:
        """The content of `export.json`. It holds no date and nothing else that varies."""
        identity = {name: value for name, value in self.base.identity.items() if name != "values"}
        return {
            "adapter": {"folder": str(self.folder), "sha256": hash_adapter(self.folder)},
            "base": {"identity": identity, "warning": self.base.warning},
            "file": {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)}
            | {name: value for name, value in found.items() if name != "proof"},
            "tokenizer": {
                "model": self.vocabulary.model,
                "pre": self.vocabulary.pre,
                "eos": self.vocabulary.tokens[self.vocabulary.ids["eos"]],
                "add_bos": self.vocabulary.add_bos,
                "notes": self.vocabulary.notes,
            },
            "proof": found["proof"],
            "versions": package_versions() | {"gguf": version("gguf")},
        }
