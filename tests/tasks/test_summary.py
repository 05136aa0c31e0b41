"""What is printed at the end of a run: in any case, and the commands that it names can be given."""

import json

import pytest
import torch

from plainlora.merging.merge import TOLERANCES
from tests.recipes.conftest import RunClassify, RunSFT, run_classify, run_sft  # noqa: F401  # fixtures

HINT = "plainlora merge --adapter"


def test_the_summary_comes_before_the_merge_and_the_merge_says_how_near_it_is(
    run_sft: RunSFT,  # noqa: F811
    run_classify: RunClassify,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    for run, kind in ((run_sft, "llama"), (run_classify, "distilbert")):
        folder = run(kind, kind, "--merge", "true")
        said = capfd.readouterr().out
        found = json.loads((folder / "all_results.json").read_text())
        drift = (
            f"{found['merge_max_abs_diff']:.1e}, {found['merge_relative_diff']:.1e} of the largest (allowed: 1e-05)"
        )
        last = f"merged model: {folder}/merged; reloaded, its logits differ by at most {drift}"
        assert said.index("trainable parameters  ") < said.index("next: plainlora ") < said.index(last)
        assert f"| logits of the merged model differ by at most |  | {drift} |" in (folder / "README.md").read_text()
        assert HINT not in said


def test_the_summary_is_printed_though_the_merge_fails(
    run_sft: RunSFT,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TOLERANCES, torch.float32, -1.0)
    with pytest.raises(SystemExit):
        run_sft("llama", "run", "--merge", "true")
    said = capfd.readouterr()
    assert "test loss  " in said.out
    assert "more than the 0e+00 allowed" in said.err


@pytest.mark.parametrize(
    ("kind", "flags", "mergeable"),
    [
        ("llama", ("--lora_target_modules", "q_proj"), True),
        ("llama", ("--lora_target_modules", "q_proj", "--lora_config", '{"init_lora_weights": "mica"}'), True),
        (
            "llama",
            ("--lora_target_modules", "q_proj", "--lora_config", '{"layer_replication": [[0, 2], [1, 2]]}'),
            False,
        ),
        ("qwen2", ("--lora_target_modules", "embed_tokens", "q_proj"), False),
    ],
)
def test_a_merge_is_advised_only_where_it_is_possible(
    kind: str,
    flags: tuple[str, ...],
    mergeable: bool,
    run_sft: RunSFT,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = run_sft(kind, "run", *flags)
    said = capfd.readouterr().out
    assert "next: plainlora generate --adapter" in said
    assert (f"\n      {HINT} {folder} --output {folder}-merged\n" in said) == (HINT in said) == mergeable
