"""What a program says, and does not, before it runs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
