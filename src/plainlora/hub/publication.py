"""What of a folder is published: the files of an allow list, checked, and without a path of the disk they lie on."""

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
from plainlora.lora.interchange import LORA_WEIGHTS, PREFIX, read_config, saved_shapes
from plainlora.lora.numerics import is_finite
from plainlora.run.adapter_base import class_labels
from plainlora.run.folder import ADAPTER, PICTURES, WHOLE_MODEL, holds_adapter
from plainlora.settings.parsing import StrictLoader

INDEX = "model.safetensors.index.json"
CARD = "README.md"
TOKENIZER = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
PNG = b"\x89PNG\r\n\x1a\n"  # how one begins
CERTIFICATE, RUN = "certificate.json", "run.json"
REPORTS = ("all_results.json", CERTIFICATE, RUN)

# An absolute path of two parts or more inside a text, of which the last is kept. Web addresses have no match.
LOCAL_PATH = re.compile(r"""(?<![\w./:~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\`'"=,;()]+[/\\])+([^\s/\\`'"=,;()]*)""")
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


@dataclass(frozen=True)
class Publication:
    """A folder that can be published.

    Attributes:
        base: Hub id of its base.
        files: By their names in the repository: where each lies, or what it is to hold instead of what lies there.
    """

    base: str
    files: Mapping[str, Path | bytes]

    def at(self, repository: str) -> dict[str, Path | bytes]:
        """The files, with the repository's name where the card says how to load them."""
        card = self.files[CARD]
        assert isinstance(card, bytes)
        return {**self.files, CARD: card.replace(HERE.encode(), repository.encode())}


@dataclass(frozen=True)
class _Weights:
    """What kind of weights a folder holds, and in which files."""

    library: str
    task: str
    names: list[str]
    config: str
    base: str | None


def collect_publication(
    folder: str | Path, base_model: str | None = None, base_revision: str | None = None
) -> Publication:
    """Checks a folder and chooses what of it is published. Nothing in the folder changes.

    Args:
        folder: An adapter or a whole model, as training or `plainlora merge` wrote it.
        base_model: Hub id of the base, where the folder names none, or a path of this disk.
        base_revision: Branch, tag or commit of an adapter's base, to be named beside it.

    Raises:
        UserError: There is nothing to publish, or what there is leads out of the folder, is damaged, empty, not
            finite, without a base that others can load, or described by a card that the Hub would refuse.
        LoRAError: The adapter's files cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that training or `plainlora merge` wrote")
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
    """A link to a file elsewhere, by which whoever wrote the folder could have your files published.

    A snapshot in the Hub's cache is links to the blobs beside it; these are in their place.
    """
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots":  # .../models--USER--NAME/snapshots/COMMIT
        root = root.parent.parent
    links = (path for path in sorted(folder.iterdir()) if path.is_symlink() and not path.is_dir())
    return next((path for path in links if not Path(os.path.realpath(path)).is_relative_to(root)), None)


def _is_picture(path: Path) -> bool:
    """Whether there is a PNG, whatever else may be called one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(PNG)) == PNG


def _config(
    folder: Path, weights: _Weights, base: str, renamed: bool, base_revision: str | None
) -> dict[str, Path | bytes]:
    """The config: an adapter's with its base on the Hub, a model's as it is but for where it was loaded from.

    A base that was renamed has no revision but the one that was given. Another's is the commit that training recorded.
    """
    path = folder / weights.config
    config = _read(path)
    if weights.library == "peft":
        recorded = _find(_optional(folder / RUN), "base", "commit")
        own = None if renamed else recorded or config.get("revision")
        config |= {"base_model_name_or_path": base, "revision": base_revision or own}
    elif config.pop("_name_or_path", None) is None:  # which older versions of Transformers wrote
        return {path.name: path}
    return {path.name: _as_json(config)}


def _find(content: Any, *keys: str) -> Any:
    """What stands below the keys; `None` if nothing does."""
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
    """An adapter whose names and shapes fit its config.

    Raises:
        UserError: They do not.
        LoRAError: There are no weights, or no config of LoRA.
    """
    config, shapes = read_config(folder), saved_shapes(folder)
    path = folder / ADAPTER[1]
    _check_tensors(path)
    if strange := [name for name in shapes if not name.startswith(PREFIX)]:
        raise UserError(f"{path}: {strange[0]} is no name that PEFT gives; save the adapter again")
    modules = {name.removesuffix(end) for name in shapes for end in LORA_WEIGHTS if name.endswith(end)}
    for module in sorted(modules):
        a, b = (shapes.get(module + end) for end in LORA_WEIGHTS)
        if a is None or b is None:
            raise UserError(f"{path}: {module} has lora_{'B' if a is None else 'A'} alone; save the adapter again")
        fits = min(len(a), len(b)) > 1 and a[0] == b[1] and (config.rank_pattern or a[0] == config.r)
        if not fits:
            raise UserError(f"{path}: {module} has A {a} and B {b}, which do not fit r={config.r} of {ADAPTER[0]}")
    targets = config.target_modules
    for target in [] if targets is None or isinstance(targets, str) else sorted(targets):
        if not any(module == PREFIX + target or module.endswith(f".{target}") for module in modules):
            raise UserError(f"{path} holds nothing of {target}, a target of {ADAPTER[0]}; save the adapter again")
    task = "text-generation" if class_labels(folder) is None else "text-classification"
    return _Weights("peft", task, [ADAPTER[1]], ADAPTER[0], config.base_model_name_or_path)


def _find_model(folder: Path) -> _Weights:
    """A whole model: one file of tensors, or those that its index names.

    Raises:
        UserError: There is no config or no tensors, or the index names what is not there.
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
    """Of what a whole model was made: as its merge, its training or its card says."""
    named = _find(_optional(folder / CERTIFICATE), "base", "identity", "name")
    named = named or _find(_optional(folder / RUN), "arguments", "model_name_or_path")
    if named is None and (folder / CARD).is_file():
        named = _metadata(folder / CARD).get("base_model")
    return named if isinstance(named, str) else None


def _merge_figures(folder: Path) -> dict[str, Any]:
    """What a merge's certificate says, in short, for a card."""
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
    """Raises `UserError` if a file holds a tensor that is empty, as ZeRO-3 leaves it (peft#1443), or not finite."""
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
    """Whether a name can be a repository's."""
    try:
        validate_repo_id(name if isinstance(name, str) and name else "/")
    except HFValidationError:
        return False
    return True


def hub_base(where: str | Path, named: str | None, given: str | None, flag: str = "--base_model") -> str:
    """The base's Hub id: the one given, or the one that is named.

    The Hub refuses a path (transformers#33922), servers refuse null (lorax#315), and a path is of use to nobody else.

    Args:
        where: What names it: a folder, or a setting.
        named: What it is called there.
        given: Its Hub id, from the command line.
        flag: The flag for that.

    Raises:
        UserError: It is no Hub id.
    """
    if given is not None:
        if not is_hub_id(given):
            raise UserError(f"{flag} {given} is no Hub id, such as openai-community/gpt2")
        return given
    if not named:
        raise UserError(f"{where} names no base model; give its Hub id with {flag}")
    # A relative path, as in `recipes/quickstart/base`, is looked for from the adapter upwards too.
    lies_near = any((parent / named / "config.json").is_file() for parent in Path(where).resolve().parents)
    if not is_hub_id(named) or ("/" in named and (is_local(named) or lies_near)):
        raise UserError(f"{where} names the base {named}, a folder of this disk; give its Hub id with {flag}")
    return named


def _for_others(content: Any, named: str | None, base: str) -> Any:
    """JSON in which the base has its Hub id, and of every other path of this disk only the last part is left.

    A recipe's `env` is left out: its values may be anything, passwords too.
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
    elif "\n" not in value and (Path(value).is_absolute() or value.startswith("~")):  # blanks and all
        value = Path(value).name
    return LOCAL_PATH.sub(r"\1", flag + equals + value)


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata block of a card, as it is written; empty if there is none.

    Raises:
        UserError: It is no YAML mapping, names a key twice, or is none that huggingface_hub can read.
    """
    try:
        block = REGEX_YAML_BLOCK.search(path.read_text(encoding="utf-8-sig"))
        loader = StrictLoader(block[2] if block else "")
        loader.name = str(path)  # for its errors
        metadata = loader.get_single_data() or {}
        if not isinstance(metadata, dict):
            raise ValueError("it is no mapping")
        ModelCardData(**metadata)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({error}); mend the block between the ---") from error
    return metadata


def _card(folder: Path, weights: _Weights, base: str, renamed: bool) -> str:
    """The card as it is published: checked, of the base that is on the Hub, without a path of this disk.

    Raises:
        UserError: The Hub would refuse it, or it names another base.
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
            f"{path}: base_model is {own}, but that of the weights is {base}; mend one, or give --base_model"
        )
    text = path.read_text(encoding="utf-8-sig")
    if renamed or own is None:
        card = ModelCard(text)
        card.data["base_model"] = base
        text = str(card)
    for quote in '`"':
        text = text.replace(f"{quote}{weights.base}{quote}", f"{quote}{base}{quote}")
    return LOCAL_PATH.sub(r"\1", text)


def find_card_problem(metadata: Mapping[str, Any], library: str) -> str | None:
    """What the Hub would refuse or misread in a card's metadata, with what to do; `None` if nothing.

    Args:
        metadata: The block at its top.
        library: What loads the weights, `peft` or `transformers`.

    The fields are those of https://huggingface.co/docs/hub/model-cards#model-card-metadata.
    """
    entries = {field: _as_list(metadata.get(field, [])) for field in ("language", "datasets", "base_model")}
    tags = metadata.get("tags", [])
    hub_ids = "write Hub ids, such as USER/NAME, or leave it out"
    rules = {
        "library_name": (metadata.get("library_name") == library, f"write `library_name: {library}`"),
        "pipeline_tag": (
            metadata.get("pipeline_tag") in list(SUPPORTED_TASKS),  # a list may be asked for what has no hash
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
