"""Runs the core's tests, and the proof where TRL is in the row, in a fresh environment for each row of grid.json.

python tests/compat/grid.py [NAME ...] --torch 2.13.0

Writes docs/compatibility.md. Environments are made below outputs/compat and thrown away.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "tests" / "compat" / "grid.json").read_text(encoding="utf-8"))
PACKAGES = ("transformers", "peft", "accelerate", "trl")
PAGE = ROOT / "docs" / "compatibility.md"
BEGINNING = """# Versions

The package has ranges, and these rows of them have been run, each in a fresh environment, by `make compat`: the core's
tests (`tests/compat/test_core.py`: inject, fuse, files both ways, merge, all beside the PEFT of the row), and, where
TRL is in the row, `plainlora compare`, the built-in proof. `requirements.txt` has the versions that everything else
was tested with. Older versions of torch than the rows' are allowed and have not been tried; neither has any other
system than Linux, for which the workflow has jobs.

"""


def run(command: list[str], where: Path, log: Path) -> int:
    """Exit status; what was printed goes to the end of a log."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("PYTHONPATH", None)
    with log.open("a", encoding="utf-8") as stream:
        return subprocess.run(
            command, cwd=where, env=environment, stdout=stream, stderr=stream, check=False
        ).returncode


def try_row(row: dict[str, str], torch: str) -> dict[str, str]:
    """What came of the core's tests and of the proof: `15 passed`, or what went wrong."""
    folder = ROOT / "outputs" / "compat" / re.sub(r"\W+", "-", row["name"])
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([f"python{row['python']}", "-m", "venv", str(folder)], check=True)
    python, log = str(folder / "bin" / "python"), folder / "log.txt"
    wanted = [f"{name}=={row[name]}" for name in PACKAGES if name in row]
    extra = "[train]" if "trl" in row else ""
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        f"torch=={torch}",
        "pytest",
        *wanted,
        f"{ROOT}{extra}",
    ]
    if run(install, ROOT, log):
        return {"core": "cannot be installed", "proof": ""}
    tests = [python, "-m", "pytest", "--confcutdir=tests/compat", "-p", "no:cacheprovider", "-rf"]
    run([*tests, "--disable-warnings", "tests/compat/test_core.py"], ROOT, log)
    core = re.findall(
        r"^=* ?(\d+ (?:passed|failed)[^,]*(?:, \d+ passed)?).* in ",
        log.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    proof = ""
    if "trl" in row:
        code = run([str(folder / "bin" / "plainlora"), "compare", "--output", "."], folder, log)
        verdicts = json.loads((folder / "parity.json").read_text(encoding="utf-8")) if code in (0, 1) else {}
        proof = {0: f"{len(verdicts.get('cases', ()))} cases hold", 1: "some levels do not hold"}.get(
            code, "does not run"
        )
    return {"core": core[-1] if core else "did not run", "proof": proof}


def main() -> int:
    """Runs the rows that are asked for; all of them write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="Rows to run; all if left out.")
    parser.add_argument("--torch", default="2.13.0")
    asked = parser.parse_args()
    rows = [row for row in ROWS if not asked.names or row["name"] in asked.names]
    lines = ["| | Python | torch | " + " | ".join(PACKAGES) + " | core | proof |", "|---" * (len(PACKAGES) + 5) + "|"]
    wrong = False
    for row in rows:
        print(f"{row['name']} ...", flush=True)
        found = try_row(row, asked.torch)
        wrong |= "failed" in found["core"] or "passed" not in found["core"] or "not" in found["proof"]
        versions = " | ".join(row.get(name, "") for name in PACKAGES)
        line = f"| {row['name']} | {row['python']} | {asked.torch} | {versions} | {' | '.join(found.values())} |"
        lines.append(line)
        print(line, flush=True)
    if not asked.names:
        PAGE.write_text(BEGINNING + "\n".join(lines) + "\n", encoding="utf-8")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
