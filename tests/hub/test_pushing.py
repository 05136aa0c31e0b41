"""Of several processes one opens the repository, and so one pushes."""

from pathlib import Path

import pytest
from accelerate import PartialState
from transformers import TrainingArguments

from plainlora.errors import UserError
from plainlora.hub.pushing import open_run_repository


def test_only_the_main_process_opens_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    training = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, push_to_hub=True, hub_token="hf_x")
    with pytest.raises(UserError):
        open_run_repository(training, print)
    monkeypatch.setitem(PartialState()._shared_state, "process_index", 1)
    assert open_run_repository(training, print) is None
