"""What a program says, and does not, before it runs."""

import ast
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from plainlora.commands import VERBS
from tests.conftest import ROOT


@pytest.mark.parametrize("recipe", ["sft.py", "classify.py"])
@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="not run: no /proc to see an import in")
def test_ctrl_c_while_the_libraries_are_imported_is_one_line(recipe: str, tmp_path: Path) -> None:
    command = [sys.executable, f"recipes/{recipe}", "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps, until = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while "libtorch" not in maps.read_text(encoding="utf-8") and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert (said, error) == ("", "SIGINT: stopped before anything was read or written\n")
    assert process.returncode == -signal.SIGINT
    assert not (tmp_path / "out").exists()


def test_any_other_error_keeps_its_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import plainlora.quiet; 1 / 0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def spin_counts(*command: str, **environment: str) -> list[int]:
    """How often a waiting thread looks before it sleeps, as every GNU OpenMP that is loaded says."""
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    process = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=own | {"OMP_DISPLAY_ENV": "VERBOSE"} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [int(count) for count in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", process.stderr)]


def test_threads_that_wait_sleep_in_a_program_and_its_children_unless_told_otherwise() -> None:
    usual = spin_counts("-c", "import torch")
    if not usual:
        pytest.skip("not run: this PyTorch has no GNU OpenMP")
    assert min(usual) > 0  # so this is what would happen
    child = "import plainlora.quiet, subprocess, sys; subprocess.run([sys.executable, '-c', 'import torch'])"
    for program in ("import plainlora.quiet, torch", child):
        assert set(spin_counts("-c", program)) == {0}
    assert min(spin_counts("-c", "import plainlora.quiet, torch", OMP_WAIT_POLICY="ACTIVE")) > 0


def test_every_program_imports_this_module_before_the_libraries() -> None:
    for program in ("recipes/sft.py", "recipes/classify.py", *(f"src/plainlora/commands/{verb}.py" for verb in VERBS)):
        page = ast.parse((ROOT / program).read_text(encoding="utf-8"))
        runs = [each for each in page.body if isinstance(each, ast.FunctionDef) and each.name == "run"]
        imports = [
            each for each in ast.walk(runs[0] if runs else page) if isinstance(each, ast.Import | ast.ImportFrom)
        ]
        first = min(imports, key=lambda each: each.lineno)
        assert isinstance(first, ast.Import), program
        assert first.names[0].name == "plainlora.quiet", program


def test_progress_bars_are_for_terminals_and_not_for_files(tmp_path: Path) -> None:
    program = "import plainlora.quiet; from tqdm import tqdm; list(tqdm(range(3), desc='counting')); print('done')"
    command = [sys.executable, "-c", program]
    own = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    piped = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    assert (piped.stdout, piped.stderr) == ("done\n", "")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with open(tmp_path / "out", "w") as out:
        subprocess.run(command, cwd=ROOT, env=own, stdout=out, stderr=theirs, check=True)
    os.set_blocking(ours, False)
    shown = os.read(ours, 100_000).decode()
    os.close(theirs)
    os.close(ours)
    assert "counting" in shown
    assert "\r" in shown
