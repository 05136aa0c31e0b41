"""Keeps tokens and the values of environment variables out of what is written."""

from collections.abc import Sequence
from typing import Any

from plainlora.settings.parsing import read_yaml

SECRETS = ("hub_token", "push_to_hub_token")


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command without the values of secret flags, written `--flag value` or `--flag=value`."""
    kept: list[str] = []
    for word in words:
        flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
        follows = kept and kept[-1].removeprefix("--").replace("-", "_") in SECRETS
        kept.append("..." if follows else word.partition("=")[0] + "=..." if "=" in word and flag in SECRETS else word)
    return kept


def config_without_secrets(path: str) -> dict[str, Any]:
    """The content of a recipe's YAML without tokens, and of `env` the names alone: the values may be passwords.

    Raises:
        UserError: The file is not a YAML mapping.
    """
    content = {name: value for name, value in read_yaml(path).items() if name not in SECRETS}
    if isinstance(content.get("env"), dict):
        content["env"] = sorted(map(str, content["env"]))
    return content
