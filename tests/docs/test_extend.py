"""The worked examples of `docs/extend.md` run, and do what the page says."""

import json
import re
from pathlib import Path
from typing import Any

from peft import PeftModel

from tests.conftest import ROOT, make_model

PAGE = (ROOT / "docs" / "extend.md").read_text()


def test_preference_tuning_is_trls_own_script_and_one_line(
    tmp_path: Path, model_dirs: dict[str, Path], capsys: Any
) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(script.splitlines()) <= 40
    names: dict[str, Any] = {}
    exec(script, names)
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n + 2}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = names["train"](
        str(model_dirs["llama"]), str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), max_steps=2, use_cpu=True,
        bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    assert "fused: 14 LoRA layers, 2 SwiGLU" in capsys.readouterr().out
    assert trainer.state.global_step == 2
    loaded = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "out"))
    trained = dict(trainer.model.named_parameters())
    weights = {name: value for name, value in loaded.named_parameters() if "lora_B" in name}
    assert len(weights) == 14
    for name, value in weights.items():
        assert value.abs().max() > 0
        assert value.equal(trained[name])
