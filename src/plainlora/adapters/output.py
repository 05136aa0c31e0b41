"""Checks the `--output` folder of the commands that read several adapters."""

from collections.abc import Sequence
from pathlib import Path

from plainlora.errors import UserError
from plainlora.run.folder import lies_in
from plainlora.settings.checks import check_writable


def check_output(output: str | Path, adapters: Sequence[str], replaced: bool = False, advice: str = "") -> None:
    """Checks the folder of `--output` before anything is read.

    Args:
        output: The folder.
        adapters: The folders that are read.
        replaced: Whether its content may be replaced.
        advice: The end of the error for a folder that is not empty.

    Raises:
        UserError: It cannot be written to, is not empty, or is, holds or lies in an adapter's folder.
    """
    check_writable(str(output), "--output")
    for adapter in adapters:
        if lies_in(adapter, output) or lies_in(output, adapter):
            raise UserError(f"--output {output} is, holds or lies in the adapter {adapter}; give a folder of its own")
    folder = Path(output)
    if not replaced and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{output} already exists; give another --output{advice}")
