"""A model's own code: which files `trust_remote_code` runs, and the options that load them."""

import os
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from plainlora.base.failures import explain
from plainlora.errors import UserError


def describe_remote_code(name: str, revision: str | None) -> str:
    """The code of a model that `trust_remote_code` runs, in one line to be shown before it runs.

    Raises:
        UserError: The model's config cannot be loaded, or it uses code from another repository, which `model_revision`
            does not pin (Transformers' `code_revision` stays `main`).
    """
    try:
        found = [PretrainedConfig.get_config_dict(name, revision=revision)[0].get("auto_map")]
        found.append(get_tokenizer_config(name, revision=revision).get("auto_map"))
    except Exception as error:
        raise explain(name, "model", error) from error
    modules = set()
    for auto_map in found:
        references = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
        for reference in (one for each in references for one in (each if isinstance(each, list) else [each])):
            if isinstance(reference, str) and "--" in reference:
                raise UserError(
                    f"{name} runs code from another repository ({reference}), which model_revision does not pin; "
                    "copy that code into a local folder with the model, and give the folder"
                )
            modules |= {f"{str(reference).rpartition('.')[0]}.py"} if reference else set()
    where = name if os.path.isdir(os.path.expanduser(name)) else f"{name} at {revision}"
    if not modules:
        return f"trust_remote_code: {where} has no code of its own"
    return f"WARNING trust_remote_code: code of {where} runs here with your rights: {', '.join(sorted(modules))}"


def code_options(config: PretrainedConfig, auto: type[_BaseAutoModelClass], trust: bool) -> dict[str, Any]:
    """Options of `from_config` for a model's own code, pinned to the commit of the config instead of `main`.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/auto/auto_factory.py
    """
    commit = getattr(config, "_commit_hash", None)
    own = trust and commit is not None and auto.__name__ in (getattr(config, "auto_map", None) or {})
    return {"trust_remote_code": trust} | ({"code_revision": commit} if own else {})
