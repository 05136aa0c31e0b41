"""Bad input to `plainlora`: one line that says what to do, exit code 2, and nothing written."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from plainlora import inject, save_adapter
from plainlora.backends import BACKENDS
from plainlora.commands import GROUPS, VERBS, build_parser, main
from plainlora.errors import UserError
from plainlora.lora.errors import LoRAError
from tests.conftest import ROOT, make_model, run_program
from tests.refusals import Run, the_one_line

TENSORS = "adapter_model.safetensors"


def make_adapter(folder: Path, kind: str, base: str | None) -> Path:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", base_model_name_or_path=base)
    save_adapter(inject(make_model(kind), config), folder)
    return folder


@pytest.fixture
def adapter(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter folder with nothing wrong, beside nothing else."""
    return make_adapter(tmp_path / "adapter", "llama", str(model_dirs["llama"]))


@pytest.fixture
def both(plainlora: Run, tmp_path: Path) -> Run:
    """The one line of `merge`, which must be that of `generate`."""

    def run(adapter: Path) -> str:
        merged = plainlora("merge", "--adapter", adapter, "--output", tmp_path / "out")
        assert plainlora("generate", "--adapter", adapter, "--prompt", "hi", "--max_new_tokens", "2") == merged
        return merged

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], r"invalid choice: 'train' \(choose from .*'reproduce'\)"),
        (["merge"], r"required: --adapter, --output; see plainlora merge --help"),
        (["merge", "--adapter", "a", "--output", "b", "--foo"], r"--foo is not an option; see plainlora merge --help"),
        (["merge", "--adap", "a", "--output", "b"], r"--adap is not an option; did you mean --adapter\?"),
        (["doctor", "--config", "a", "--lora_r", "4"], r"a recipe's flags stand after a --: -- --lora_r"),
        (["merge", "--adapter", "a", "--output", "b", "--dtype", "int8"], r"invalid choice: 'int8'"),
        (
            ["merge", "--adapter", "a", "--output", "b", "--base", "8-bit"],
            r"--base is 16bit or dequantized, not 8-bit",
        ),
        (["generate", "--adapter", "a"], r"required: --prompt"),
        (["generate", "--adapter", "a", "--prompt", "b", "--max_new_tokens", "0"], r"at least 1, not '0'"),
        (["generate", "--adapter", "a", "--prompt", "b", "--max_new_tokens", "few"], r"at least 1, not 'few'"),
        (["generate", "--adapter", "gone", "--prompt", "b"], r"gone does not exist, so it has no adapter_config"),
        (["merge", "--adapter", "gone", "--output", "b"], r"gone does not exist, so it has no adapter_config"),
    ],
)
def test_bad_arguments(plainlora: Run, arguments: list[str], said: str) -> None:
    assert re.search(said, plainlora(*arguments))


@pytest.mark.parametrize("weight", ["-1", "-.5", "-1.", "-1e-3", "-1E+3", "-2.5e10", "-1_000", "-inf", "-nan"])
def test_a_negative_weight_is_no_flag(weight: str) -> None:
    words = ["merge", "--adapter", "a", "b", "--output", "c", "--weights", weight, "0.5"]
    given = build_parser().parse_args(words).weights
    assert [str(each) for each in given] == [str(float(weight)), "0.5"]
    with pytest.raises(UserError, match="-1e-3x"):
        build_parser().parse_args([*words, "-1e-3x"])


@pytest.mark.parametrize(("command", "unbuffered"), [(["--help"], ""), (["diff", "{adapter}"], "1")])
def test_a_reader_that_has_left_is_no_error(adapter: Path, command: list[str], unbuffered: str) -> None:
    """Unbuffered, a line fails where it is printed; else all lines where they are flushed at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-c", "from plainlora.commands import main; main()"]
    done = subprocess.run(
        [*program, *(word.format(adapter=adapter) for word in command)],
        stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 128 + signal.SIGPIPE)


def test_a_folder_without_a_config(both: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty has no adapter_config.json; give the folder that training wrote" in both(tmp_path / "empty")


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "IA3"}', '{"peft_type": "NEW"}', "\0"])
def test_a_config_that_is_none(both: Run, adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_text(content)
    assert re.search(r"adapter_config.json is not a (PEFT adapter|LoRA) config", both(adapter))


@pytest.mark.parametrize("kept", [0, 20, 500, -1])
def test_u10_tensors_cut_short(both: Run, adapter: Path, kept: int) -> None:
    content = (adapter / TENSORS).read_bytes()
    (adapter / TENSORS).write_bytes(content[:kept])
    assert f"{TENSORS} is corrupt or cut short" in both(adapter)


def test_u23_a_pickle_is_not_loaded(both: Run, adapter: Path) -> None:
    (adapter / TENSORS).unlink()
    assert f"has no {TENSORS}" in both(adapter)
    torch.save({}, adapter / "adapter_model.bin")
    assert "adapter_model.bin is a pickle, which can run code when it is loaded" in both(adapter)


class Harm:
    """What a pickle can do to whoever loads it: here, make a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("again", [False, True])
def test_u23_nor_does_peft_load_it(adapter: Path, tmp_path: Path, again: bool) -> None:
    """PEFT would: without safetensors it falls back to `adapter_model.bin`."""
    backend, model = BACKENDS["peft"], make_model("llama")
    if again:  # as when a run is resumed
        model = backend.load(model, adapter)
    trace = tmp_path / "trace"
    torch.save({"a": Harm(trace)}, adapter / "adapter_model.bin")
    (adapter / TENSORS).unlink()
    with pytest.raises(LoRAError, match=r"adapter_model.bin is a pickle, which can run code when it is loaded"):
        (backend.reload if again else backend.load)(model, adapter)
    assert not trace.exists()


def test_u15_an_adapter_of_another_base(both: Run, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    narrow = make_adapter(tmp_path / "narrow", "llama", str(model_dirs["llama"]))
    config = json.loads((narrow / "adapter_config.json").read_text())
    (narrow / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    assert re.search(
        r"has shape \(2, (64|128)\), the model needs \(4, \1\); .*another base model or rank", both(narrow)
    )
    both(make_adapter(tmp_path / "gpt2", "gpt2", str(model_dirs["llama"])))


def test_a_base_that_cannot_be_had(both: Run, tmp_path: Path) -> None:
    unnamed = make_adapter(tmp_path / "unnamed", "llama", None)
    assert "names no base model; set base_model_name_or_path in it" in both(unnamed)
    away = make_adapter(tmp_path / "away", "llama", "nobody/nothing")
    assert "'nobody/nothing' cannot be loaded from the Hub" in both(away)


@pytest.mark.parametrize("base", ["4bit", "8bit", "nf4"])
def test_u01_merging_into_quantised_weights_is_refused_with_the_reason(
    plainlora: Run, adapter: Path, tmp_path: Path, base: str
) -> None:
    said = plainlora("merge", "--adapter", adapter, "--output", tmp_path / "out", "--base", base)
    assert "rounding the sum back to a few bits can erase the adapter (peft#2321); use --base 16bit or" in said


@pytest.mark.parametrize("record", [None, '{"quantization_config": null}'])
def test_u03_dequantized_needs_a_base_that_was_quantised(
    plainlora: Run, adapter: Path, tmp_path: Path, record: str | None
) -> None:
    if record:
        (adapter / "run.json").write_text(record)
    said = plainlora("merge", "--adapter", adapter, "--output", tmp_path / "out", "--base", "dequantized")
    assert "was not trained on a quantised base" in said


def test_an_output_that_is_already_there(plainlora: Run, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    for name in ("full/notes.txt", "file"):
        (tmp_path / name).write_text("mine")
    merge = ["merge", "--adapter", adapter, "--output"]
    assert "full already exists; give another --output, or replace it with --overwrite" in plainlora(
        *merge, tmp_path / "full"
    )
    for name in ("file", "file/below"):
        assert "file is a file; give a folder" in plainlora(*merge, tmp_path / name, "--overwrite")
    assert "--output is empty" in plainlora(*merge, "")


def test_overwriting_never_takes_the_adapter_or_the_base(
    plainlora: Run, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(model_dirs["llama"], tmp_path / "models" / "base")
    adapter = make_adapter(tmp_path / "adapters" / "adapter", "llama", str(base))
    for output, what in (
        (adapter, "the adapter"), (adapter.parent, "the adapter"), (base, "the base model"), (tmp_path, "the adapter"),
    ):  # fmt: skip
        said = plainlora("merge", "--adapter", adapter, "--output", output, "--overwrite")
        assert f"holds {what}; give a folder of its own" in said


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_answers_at_once_and_without_torch(verb: str) -> None:
    program = (
        "import sys; from plainlora.commands import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    best = float("inf")
    for _ in range(3):  # the machine may be busy with something else
        started = time.monotonic()
        done = run_program("-c", program, *([verb] if verb else []), "--help")
        best = min(best, time.monotonic() - started)
        assert done.returncode == 0, done.stderr
        assert "usage: plainlora " + verb in done.stdout
        if best < 1:
            break
    assert best < 1


def test_without_a_verb_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "check it:" in capsys.readouterr().err


def test_as_a_process_of_its_own(adapter: Path, tmp_path: Path) -> None:
    (adapter / TENSORS).write_bytes(b"")
    script = Path(sys.executable).with_name("plainlora")
    done = run_program(script, "merge", "--adapter", adapter, "--output", tmp_path / "out")
    assert "is corrupt or cut short" in the_one_line(done.returncode, done.stdout, done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "code", "says"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "")])
def test_a_signal_is_at_most_one_line_and_leaves_nothing_half_written(
    number: int, code: int, says: str, adapter: Path, tmp_path: Path
) -> None:
    program = "from plainlora.commands import main; main()"
    command = [sys.executable, "-c", program, "merge", "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    merging = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while merging.poll() is None and not list(tmp_path.glob(".out.*")):  # where the merged model is prepared
        time.sleep(0.01)
    merging.send_signal(number)
    _, said = merging.communicate(timeout=60)
    assert merging.returncode == code
    assert not says or said.splitlines()[-1] == says
    assert "Traceback" not in said
    assert not list(tmp_path.glob("*out*"))


def test_the_help_of_every_verb_ends_with_an_example_that_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overview = build_parser().format_help()
    for want, group in GROUPS.items():
        assert f"\n{want}:\n" in overview
        for verb, (does, example) in group.items():
            assert re.search(rf"^  {verb} +{re.escape(does)}$", overview, flags=re.MULTILINE)
            program, *words = shlex.split(example)
            assert (program, words[0]) == ("plainlora", verb)
            parsed = build_parser().parse_args(words)
            assert parsed.verb == verb
            assert all(Path(word).is_file() for word in words if word.endswith(".yaml"))
