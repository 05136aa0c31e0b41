"""What a program says before it waits for a lock that a killed process left."""

import os
import time
from pathlib import Path

import pytest

from plainlora.errors import UserError
from plainlora.settings.programs import SFT


@pytest.mark.parametrize(("minutes", "warned"), [(0, False), (7, True)])
def test_a_lock_that_is_held_for_long_is_named(
    minutes: int, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 60 * minutes,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError):  # it ends before DeepSpeed is asked for
        SFT.read(["--config", "nowhere.yaml"])
    told = capsys.readouterr().err
    assert (f"DeepSpeed may wait for {lock}, which a process took 7 min ago" in told) == warned
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    with pytest.raises(UserError):
        SFT.read(["--config", "nowhere.yaml"])
    assert not capsys.readouterr().err
