"""Runs `with_torchao.py` in a process that has torchao, which Transformers would import in all others too."""

import os
import re
import subprocess
import sys

from tests.conftest import ROOT

TORCHAO = ROOT / ".venv" / "torchao"  # `make install` puts it there, beside everything else


def test_int8_of_torchao() -> None:
    paths = [str(TORCHAO), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/lora/storage/with_torchao.py"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert re.search(r"\b5 passed", done.stdout), done.stdout[-3000:]
