"""Selects the files of a folder that are published, by an allow list; checks them, and removes local paths."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.pipelines import SUPPORTED_TASKS

from plainlora.data.datasets import is_local
from plainlora.errors import UserError
from plainlora.folders import find_damage
from plainlora.hub.model_card import HERE, plain_card
from plainlora.hub.repository import words_of
from plainlora.json_files import read_mapping
from plainlora.lora.config import find_unsupported
from plainlora.lora.interchange import LORA_WEIGHTS, PREFIX, read_config, saved_shapes
from plainlora.lora.numerics import is_finite
from plainlora.run.adapter_base import class_labels
from plainlora.run.folder import ADAPTER, INDEX, PICTURES, WHOLE_MODEL, holds_adapter
from plainlora.settings.parsing import StrictLoader

CARD = "README.md"
TOKENIZER = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
# PEFT's names of an adapted embedding's A and B, and the fields of adapters whose A and B are not of rank r:
# https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py (`Embedding`, `ParamWrapper`)
EMBEDDING_WEIGHTS = (".lora_embedding_A", ".lora_embedding_B")
OF_OTHER_SHAPE = {"target_parameters", "use_bdlora"}
PNG = b"\x89PNG\r\n\x1a\n"  # the beginning of a PNG file
CERTIFICATE, RUN = "certificate.json", "run.json"
REPORTS = ("all_results.json", CERTIFICATE, RUN)

# An absolute path of two or more parts inside a text; its last part is kept. Web addresses do not match.
LOCAL_PATH = re.compile(r"""(?<![\w./:~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\`'"=,;()]+[/\\])+([^\s/\\`'"=,;()]*)""")
QUOTED_PATH = re.compile(r"""([`"'])((?:~|[A-Za-z]:)?[/\\][^`"'\n]*[^`"'\n/\\])\1""")  # in quotes with spaces too
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


@dataclass(frozen=True)
class Publication:
    """A folder that can be published.

    Attributes:
        base: Hub id of its base.
        files: Each file by its name in the repository: its path, or new content.
    """

    base: str
    files: Mapping[str, Path | bytes]

    def at(self, repository: str) -> dict[str, Path | bytes]:
        """The files, with the repository's name in the card's loading examples."""
        card = self.files[CARD]
        assert isinstance(card, bytes)
        return {**self.files, CARD: card.replace(HERE.encode(), repository.encode())}


@dataclass(frozen=True)
class _Weights:
    """The weights of a folder: their library, task, files, config and base."""

    library: str
    task: str
    names: list[str]
    config: str
    base: str | None


def collect_publication(
    folder: str | Path, base_model: str | None = None, base_revision: str | None = None
) -> Publication:
    """Checks a folder and selects what is published. Nothing in the folder changes.

    Args:
        folder: An adapter or a whole model, as training or `plainlora merge` wrote it.
        base_model: Hub id of the base, if the folder names none, or a local path.
        base_revision: Branch, tag or commit of an adapter's base.

    Raises:
        UserError: There is nothing to publish; a file is a link out of the folder, damaged, empty or not finite; the
            base has no Hub id; or the Hub would refuse the model card.
        LoRAError: The adapter's files cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the one that training or `plainlora merge` wrote")
    if link := _find_link_outside(folder):
        raise UserError(
            f"{folder} is not published: {link.name} is a link to {os.readlink(link)}, outside of the folder; put the "
            "files themselves into the folder"
        )
    if damage := find_damage(folder):
        raise UserError(f"{folder}: {damage}; write it again, or take manifest.json away if the change is yours")
    weights = _find_adapter(folder) if holds_adapter(folder) else _find_model(folder)
    base = hub_base(folder, weights.base, base_model)

    files: dict[str, Path | bytes] = {name: folder / name for name in weights.names}
    files |= {name: folder / name for name in TOKENIZER if (folder / name).is_file()}
    files |= {name: folder / name for name in PICTURES if _is_picture(folder / name)}
    files |= _config(folder, weights, base, base_model is not None, base_revision)
    for name in REPORTS:
        if (folder / name).is_file():
            files[name] = _as_json(_for_others(_read(folder / name), weights.base, base))
    files[CARD] = _card(folder, weights, base, base_model is not None).encode()
    for name, content in files.items():
        if TOKEN.search(words_of(name, content)):
            raise UserError(f"{folder / name} holds what looks like a Hub token; take it out")
    return Publication(base, files)


def _find_link_outside(folder: Path) -> Path | None:
    """A link to a file outside the folder, which could publish private files.

    Links of a snapshot in the Hub's cache lead to its blobs, and are accepted.
    """
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots":  # .../models--USER--NAME/snapshots/COMMIT
        root = root.parent.parent
    links = (path for path in sorted(folder.iterdir()) if path.is_symlink() and not path.is_dir())
    return next((path for path in links if not Path(os.path.realpath(path)).is_relative_to(root)), None)


def _is_picture(path: Path) -> bool:
    """Whether a file is a PNG by its content."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(PNG)) == PNG


def _config(
    folder: Path, weights: _Weights, base: str, renamed: bool, base_revision: str | None
) -> dict[str, Path | bytes]:
    """The config to publish: an adapter's with its base's Hub id, a model's without the path it was loaded from.

    The revision of an adapter's base is the one given, else the commit that training recorded; not if the base was
    renamed.
    """
    path = folder / weights.config
    config = _read(path)
    if weights.library == "peft":
        recorded = _find(_optional(folder / RUN), "base", "commit")
        own = None if renamed else recorded or config.get("revision")
        config |= {"base_model_name_or_path": base, "revision": base_revision or own}
    elif config.pop("_name_or_path", None) is None:  # written by older versions of Transformers
        return {path.name: path}
    return {path.name: _as_json(config)}


def _find(content: Any, *keys: str) -> Any:
    """The value under nested keys; `None` if there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _optional(path: Path) -> dict[str, Any]:
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_mapping(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); write the folder again") from error


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _find_adapter(folder: Path) -> _Weights:
    """An adapter whose names and shapes match its config.

    Raises:
        UserError: They do not match.
        LoRAError: There are no weights, or there is no LoRA config.
    """
    config, shapes = read_config(folder), saved_shapes(folder)
    path = folder / ADAPTER[1]
    _check_tensors(path)
    if strange := [name for name in shapes if not name.startswith(PREFIX)]:
        raise UserError(f"{path}: {strange[0]} is not a name that PEFT gives; save the adapter again")
    modules = {name.removesuffix(end) for name in shapes for end in LORA_WEIGHTS if name.endswith(end)}
    of_other_shape = find_unsupported(config).keys() & OF_OTHER_SHAPE
    for module in sorted(modules):
        a, b = (shapes.get(module + end) for end in LORA_WEIGHTS)
        if a is None or b is None:
            raise UserError(f"{path}: {module} has lora_{'B' if a is None else 'A'} alone; save the adapter again")
        fits = min(len(a), len(b)) > 1 and a[0] == b[1] and (config.rank_pattern or a[0] == config.r)
        if not (fits or of_other_shape):
            raise UserError(f"{path}: {module} has A {a} and B {b}, which do not fit r={config.r} of {ADAPTER[0]}")
    modules |= {name.removesuffix(end) for name in shapes for end in EMBEDDING_WEIGHTS if name.endswith(end)}
    targets = config.target_modules
    for target in [] if targets is None or isinstance(targets, str) else sorted(targets):
        if not any(module == PREFIX + target or module.endswith(f".{target}") for module in modules):
            raise UserError(f"{path} holds nothing of {target}, a target of {ADAPTER[0]}; save the adapter again")
    task = "text-generation" if class_labels(folder) is None else "text-classification"
    return _Weights("peft", task, [ADAPTER[1]], ADAPTER[0], config.base_model_name_or_path)


def _find_model(folder: Path) -> _Weights:
    """A whole model: one file of tensors, or several named by an index.

    Raises:
        UserError: The config, the tensors, or a file that the index names is missing.
    """
    description, single = WHOLE_MODEL
    if not (folder / description).is_file():
        raise UserError(
            f"{folder} holds neither {ADAPTER[0]} nor {description}; give an adapter's or a model's folder"
        )
    names = [single]
    if (folder / INDEX).is_file():
        named = _read(folder / INDEX).get("weight_map")
        names = [INDEX, *sorted({str(name) for name in named.values()})] if isinstance(named, dict) else []
        if not names or any(not re.fullmatch(r"[\w.-]+", name) for name in names):
            raise UserError(f"{folder / INDEX} names files outside of its folder, or none; write the model again")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} has no {missing[0]}; only whole models in safetensors are published")
    for name in set(names) - {INDEX}:
        _check_tensors(folder / name)
    classifies = "ForSequenceClassification" in str(_read(folder / description).get("architectures"))
    task = "text-classification" if classifies else "text-generation"
    return _Weights("transformers", task, names, description, _base_of_model(folder))


def _base_of_model(folder: Path) -> str | None:
    """The base of a whole model, from its certificate, its `run.json` or its card."""
    named = _find(_optional(folder / CERTIFICATE), "base", "identity", "name")
    named = named or _find(_optional(folder / RUN), "arguments", "model_name_or_path")
    if named is None and (folder / CARD).is_file():
        named = _metadata(folder / CARD).get("base_model")
    return named if isinstance(named, str) else None


def _merge_figures(folder: Path) -> dict[str, Any]:
    """The main figures of a merge's certificate, for a card."""
    certificate = _optional(folder / CERTIFICATE)
    kind, merged = str(_find(certificate, "base", "kind")), _find(certificate, "figures", "merged")
    text, rows, tokens = (_find(certificate, "measured_on", name) for name in ("text", "rows", "tokens"))
    drift = _find(merged, "against", kind)
    prompts, texts = _find(drift, "prompts"), _find(drift, "classes")
    on = f"{prompts} prompts" if prompts else f"{texts} texts" if texts else ""
    figures = {
        "precision": _find(certificate, "merged", "dtype"),
        f"perplexity on {text} ({rows} rows, {tokens} tokens)": _find(merged, "perplexity") if text else None,
        f"largest difference of a logit from the adapter model's{on and f' on {on}'}": _find(drift, "max_abs_diff"),
        "the same over the largest logit": _find(drift, "relative_diff"),
    }
    return {LOCAL_PATH.sub(r"\1", name): value for name, value in figures.items() if value is not None}


def _check_tensors(path: Path) -> None:
    """Raises `UserError` for a file with a tensor that is empty (as after ZeRO-3, peft#1443) or not finite."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                tensor = file.get_tensor(name)
                if tensor.numel() == 0:
                    raise UserError(
                        f"{path}: {name} is empty, of shape {tuple(tensor.shape)}; gather it and save again"
                    )
                if not is_finite(tensor):
                    raise UserError(f"{path}: {name} holds values that are not finite; the training diverged")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is corrupt or cut short ({error}); write it again") from error
    if not names:
        raise UserError(f"{path} holds no tensor; write it again")


def is_hub_id(name: object) -> bool:
    """Whether a name is a valid Hub id."""
    try:
        validate_repo_id(name if isinstance(name, str) and name else "/")
    except HFValidationError:
        return False
    return True


def hub_base(where: str | Path, named: str | None, given: str | None, flag: str = "--base_model") -> str:
    """The base's Hub id: the one given on the command line, else the recorded one.

    A local path is refused, because the Hub refuses it too (transformers#33922), and servers refuse null (lorax#315).

    Args:
        where: The folder or the setting that names the base.
        named: The base's name there.
        given: The Hub id from the command line.
        flag: The flag of `given`.

    Raises:
        UserError: The name is not a Hub id.
    """
    if given is not None:
        if not is_hub_id(given):
            raise UserError(f"{flag} {given} is not a Hub id, such as openai-community/gpt2")
        return given
    if not named:
        raise UserError(f"{where} names no base model; give its Hub id with {flag}")
    # A relative path, such as `recipes/quickstart/base`, may start at any parent of the adapter.
    lies_near = any((parent / named / "config.json").is_file() for parent in Path(where).resolve().parents)
    if not is_hub_id(named) or ("/" in named and (is_local(named) or lies_near)):
        raise UserError(f"{where} names the base {named}, a folder of this disk; give its Hub id with {flag}")
    return named


def _for_others(content: Any, named: str | None, base: str) -> Any:
    """JSON for publishing: the base's Hub id instead of its path, and only the last part of every other local path.

    A recipe's `env` is left out, because its values may be passwords.
    """
    if isinstance(content, dict):
        return {key: _for_others(value, named, base) for key, value in content.items() if key != "env"}
    if isinstance(content, list):
        return [_for_others(value, named, base) for value in content]
    if not isinstance(content, str):
        return content
    flag, equals, value = content.rpartition("=")  # of a command, as in --model_name_or_path=PATH
    if named and value == named:
        value = base
    elif named and Path(named).is_absolute():
        value = value.replace(named, base)
    if "\n" not in value and (Path(value).is_absolute() or value.startswith("~")):  # may contain spaces
        value = Path(value).name
    return LOCAL_PATH.sub(r"\1", flag + equals + value)


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata block of a card; empty if there is none.

    Raises:
        UserError: It is not a YAML mapping, has a key twice, or cannot be read by huggingface_hub.
    """
    try:
        block = REGEX_YAML_BLOCK.search(path.read_text(encoding="utf-8-sig"))
        loader = StrictLoader(block[2] if block else "")
        loader.name = str(path)  # for its errors
        metadata = loader.get_single_data() or {}
        if not isinstance(metadata, dict):
            raise ValueError("it is not a mapping")
        ModelCardData(**metadata)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({error}); fix the block between the ---") from error
    return metadata


def _card(folder: Path, weights: _Weights, base: str, renamed: bool) -> str:
    """The card to publish: checked, with the base's Hub id, and without local paths.

    Raises:
        UserError: The Hub would refuse the card, or it names another base.
    """
    path = folder / CARD
    if not path.is_file():
        figures = _merge_figures(folder)
        return plain_card(folder, weights.library, weights.task, base, figures)
    metadata = _metadata(path)
    if problem := find_card_problem(metadata, weights.library):
        raise UserError(f"{path}: {problem}")
    own = metadata.get("base_model")
    if own is not None and base not in (own if isinstance(own, list) else [own]) and not renamed:
        raise UserError(
            f"{path}: base_model is {own}, but that of the weights is {base}; fix one, or give --base_model"
        )
    text = path.read_text(encoding="utf-8-sig")
    if renamed or own is None:
        card = ModelCard(text)
        card.data["base_model"] = base
        text = str(card)
    for quote in '`"':
        text = text.replace(f"{quote}{weights.base}{quote}", f"{quote}{base}{quote}")
    text = QUOTED_PATH.sub(lambda match: match[1] + re.split(r"[/\\]", match[2])[-1] + match[1], text)
    return LOCAL_PATH.sub(r"\1", text)


def find_card_problem(metadata: Mapping[str, Any], library: str) -> str | None:
    """What is wrong with a card's metadata, and what to do; `None` if nothing is.

    The fields are those of https://huggingface.co/docs/hub/model-cards#model-card-metadata.

    Args:
        metadata: The card's metadata.
        library: The library of the weights, `peft` or `transformers`.
    """
    entries = {field: _as_list(metadata.get(field, [])) for field in ("language", "datasets", "base_model")}
    tags = metadata.get("tags", [])
    hub_ids = "write Hub ids, such as USER/NAME, or leave it out"
    rules = {
        "library_name": (metadata.get("library_name") == library, f"write `library_name: {library}`"),
        "pipeline_tag": (
            metadata.get("pipeline_tag") in list(SUPPORTED_TASKS),  # a list, for values without a hash
            f"known are {', '.join(SUPPORTED_TASKS)}",
        ),
        "tags": (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags), "write a list of words"),
        "license": (isinstance(metadata.get("license", ""), str), "write one word, such as apache-2.0 or other"),
        "language": (
            all(isinstance(each, str) for each in entries["language"]),
            "write a code such as en, or a list of them, in quotes where YAML reads something else, as it does no",
        ),
        "datasets": (all(is_hub_id(each) for each in entries["datasets"]), hub_ids),
        "base_model": (all(is_hub_id(each) for each in entries["base_model"]), hub_ids),
    }
    for field, (holds, advice) in rules.items():
        if not holds:
            return f"{field} is {metadata.get(field)!r}; {advice}"
    return None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
