"""Checks the all_results.json of a quickstart against its promised figures; exit code 1 if one does not hold."""

import json
import sys
from pathlib import Path


def main() -> None:
    path = Path(sys.argv[1])
    found = json.loads(path.read_text(encoding="utf-8"))
    before, after = found["exact_match_base"], found["exact_match_adapter"]
    expected = {
        "exact_match_base <= 0.05": before <= 0.05,
        "exact_match_adapter >= 0.80": after >= 0.80,
        "eval_loss_adapter < eval_loss_base": found["eval_loss_adapter"] < found["eval_loss_base"],
        "merge_max_abs_diff < 1e-3": found["merge_max_abs_diff"] < 1e-3,
        "trainable_params < total_params": found["trainable_params"] < found["total_params"],
    }
    broken = [what for what, holds in expected.items() if not holds]
    if broken:
        sys.exit(f"error: {path} does not hold: {', '.join(broken)}")
    print(f"quickstart: base {before:.1%}, adapter {after:.1%}: as expected".replace("%", " %"))


if __name__ == "__main__":
    main()
