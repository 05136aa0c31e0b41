"""A thousand damaged adapters, bases, recipes and data files: each ends well or in one line, nothing half written.

`PLAINLORA_FUZZ="SEED CASES"` looks further than the suite does. What fails is named with its number;
`PLAINLORA_FUZZ_ONLY=NUMBER` runs that case alone, `PLAINLORA_FUZZ_DOORS="NAME NAME"` only what these functions do.
"""

import gzip
import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import ModelConfig, ScriptArguments

from plainlora import inject, save_adapter
from plainlora.base.identity import describe_base
from plainlora.base.tokenizer import load_tokenizer
from plainlora.commands import main
from plainlora.data.prompts import install_template
from plainlora.errors import run_program
from plainlora.hub.publication import collect_publication
from plainlora.settings.arguments import ClassifyArguments, ClassifyConfig, SFTArguments, SFTRecipeConfig
from plainlora.settings.programs import CLASSIFY, SFT, Settings
from plainlora.tasks.rows import prepare_rows, prepare_texts
from tests.conftest import BACKBONES, ROOT, ROWS, TEXTS, make_model
from tests.mutations import Draw, damage_file, damage_folder, in_values, listing
from tests.refusals import without_progress

SEED, CASES = map(int, os.environ.get("PLAINLORA_FUZZ", "0 1000").split())
# Until a case is said to have no end; others take hundredths of one.
SECONDS = {"a_run": 120, "a_merge": 300, "a_comparison": 60, "a_diagnosis": 60}
CHAT = [{"messages": [{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": "b"}]} for n in range(4)]
PROMPTS = ["", " ", "\0", "\udcff", "🦙\u2028\r", "x" * 3000, "<|endoftext|>" * 9, "{{ x }}", "a\n\n### Input:\nb"]
RUN = {
    "command": ["recipes/sft.py", "--config", "lora.yaml", "--seed", "1"],
    "config": {"seed": 1, "output_dir": "out", "lora_r": 2},
    "processes": 1,
    "threads": 2,
    "device": "cpu",
    "versions": {"torch": "2.0", "peft": "0.1"},
    "quantization_config": None,
    "rows": {"train": {"sha256": "34cd"}},
    "trained_at_start_sha256": "56ef",
    "order_sha256": "78ab",
    "steps": 1,
    "weights": {"file": "adapter_model.safetensors", "sha256": "90cd"},
}
PAIRS = [{"prompt": f"a{n}", "completion": "b"} for n in range(4)]


class Hang(BaseException):
    """A case has taken too long. No `Exception`, so that nobody takes it for a damaged file."""


@dataclass
class Whole:
    """What is copied and damaged, and what the copies are used with."""

    adapter: Path
    base: Path
    classifier: Path
    data: Path
    outside: Path
    tokenizer: PreTrainedTokenizerFast
    words: PreTrainedTokenizerFast


@pytest.fixture
def whole(
    tmp_path: Path,
    model_dirs: dict[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    word_tokenizer: PreTrainedTokenizerFast,
) -> Whole:
    """An adapter as training leaves it, its base, and the same rows in every kind of file."""
    base, adapter, data = model_dirs["llama"], tmp_path / "adapter", tmp_path / "data"
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    )
    save_adapter(inject(make_model("llama"), config), adapter)
    tuned = load_tokenizer(str(base))
    install_template(tuned, "alpaca")
    tuned.save_pretrained(adapter)
    run = {"quantization_config": None, "arguments": {"lora_r": 2, "max_length": 64}, "labels": None}
    (adapter / "run.json").write_text(json.dumps(run))
    classifier, backbone = tmp_path / "classifier", BACKBONES["distilbert"]()
    backbone.id2label = {0: "ham", 1: "spam"}
    AutoModelForSequenceClassification.from_config(backbone).save_pretrained(classifier)
    word_tokenizer.save_pretrained(classifier)
    config = LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS", base_model_name_or_path="../classifier")
    adapted = inject(AutoModelForSequenceClassification.from_pretrained(classifier), config)
    save_adapter(adapted, tmp_path / "classifier_adapter")
    data.mkdir()
    for name, rows in (("alpaca", ROWS[:8]), ("chat", CHAT), ("pairs", PAIRS), ("texts", TEXTS[:40])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (data / f"{name}.json").write_text(json.dumps(rows))
        Dataset.from_list(rows).to_parquet(data / f"{name}.parquet")
        (data / f"{name}.jsonl.gz").write_bytes(gzip.compress((data / f"{name}.jsonl").read_bytes()))
    for name, separator in (("csv", ","), ("tsv", "\t")):
        lines = [separator.join(row.values()) for row in [{"text": "text", "label": "label"}, *TEXTS[:40]]]
        (data / f"texts.{name}").write_text("\n".join(lines) + "\n")
    outside = tmp_path / "outside" / "secret"
    outside.parent.mkdir()
    outside.write_text("not yours")
    return Whole(adapter, base, classifier, data, outside, tuned, word_tokenizer)


Door = Callable[[Path, Whole, Draw], tuple[str, Callable[[], object]]]


def damaged(folder: Path, whole: Whole, draw: Draw) -> str:
    """Damages a file of a folder, or the folder."""
    if draw.random() < 0.15:
        return damage_folder(folder, whole.outside, draw)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return " and ".join(damage_file(draw.choice(files), draw) for _ in range(draw.choice([1, 1, 1, 2])))


def an_adapter(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """`plainlora generate`, with PEFT beside it now and then."""
    shutil.copytree(whole.adapter, folder / "adapter")
    how = damaged(folder / "adapter", whole, draw)
    prompt = draw.choice(PROMPTS) if draw.random() < 0.1 else "hi"
    command = ["generate", "--adapter", str(folder / "adapter"), "--prompt", prompt, "--max_new_tokens", "1"]
    if draw.random() < 0.2:
        command.append("--with_peft")
    return f"{how}, {prompt!r:.20} {command[7:]}", lambda: main(command)


def a_classifier(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """`plainlora predict` with a whole classifier, or with an adapter on it."""
    shutil.copytree(whole.classifier, folder / "classifier")
    model = folder / "classifier"
    if draw.random() < 0.5:
        model = folder / "adapter"
        shutil.copytree(whole.classifier.with_name("classifier_adapter"), model)
    return damaged(model, whole, draw), lambda: main(["predict", "--model", str(model), "--text", "see you"])


def a_merge(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """`plainlora merge` of an adapter that is read, but holds other values than it was saved with."""
    shutil.copytree(whole.adapter, folder / "adapter")
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(in_values(weights.read_bytes(), draw))
    return "other values", lambda: main(
        ["merge", "--adapter", str(folder / "adapter"), "--output", str(folder / "out")]
    )


def a_base(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """`plainlora generate` on a damaged base, without the adapter's own tokenizer."""
    shutil.copytree(whole.base, folder / "base")
    (folder / "adapter").mkdir()
    shutil.copy(whole.adapter / "adapter_model.safetensors", folder / "adapter")
    config = json.loads((whole.adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    how = damaged(folder / "base", whole, draw)
    command = ["generate", "--adapter", str(folder / "adapter"), "--prompt", "hi", "--max_new_tokens", "1"]
    return how, lambda: main(command)


RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))


def a_recipe(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """What both programs do with a YAML before they look at data."""
    path = folder / "recipe.yaml"
    source = draw.choice(RECIPES)
    shutil.copy(source, path)
    how = damage_file(path, draw)

    def parse() -> None:
        classifies = "imdb" in str(source) or "spam" in str(source)
        (CLASSIFY if classifies else SFT).parse(["--config", str(path), "--use_cpu"])

    return f"{how} ({source.parent.name})", lambda: run_program(parse)


def some_rows(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """What `sft.py` or `classify.py` makes of a data file."""
    source = draw.choice(sorted(whole.data.iterdir()))
    path = folder / source.name
    if source.suffix == ".gz" and draw.random() < 0.7:  # inside; otherwise the packed bytes
        path = folder / source.stem
        path.write_bytes(gzip.decompress(source.read_bytes()))
        how = damage_file(path, draw)
        path.with_name(source.name).write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        path = path.with_name(source.name)
    else:
        shutil.copy(source, path)
        how = damage_file(path, draw)
    script = ScriptArguments(dataset_name=str(path))

    def prepare() -> None:
        if source.name.startswith("texts"):
            recipe = ClassifyArguments(validation_split_size=0.2)
            settings = Settings(recipe, script, ClassifyConfig(use_cpu=True), ModelConfig())
            prepare_texts(settings, whole.words, 32, lambda line: None)
        else:
            training = SFTRecipeConfig(use_cpu=True, bf16=False, max_length=draw.choice([16, 200, 256, None]))
            recipe = SFTArguments(on_overflow=draw.choice(["drop", "truncate"]), test_split_size=0.25)
            prepare_rows(Settings(recipe, script, training, ModelConfig()), whole.tokenizer, lambda line: None)

    return f"{how} ({source.name})", lambda: run_program(prepare)


def a_small_run(folder: Path, whole: Whole) -> Path:
    """A base, some rows, and a recipe for one step on them."""
    shutil.copytree(whole.base, folder / "base")
    shutil.copy(whole.data / "alpaca.jsonl", folder)
    recipe = folder / "recipe.yaml"
    settings = {"lora_r": 2, "lora_target_modules": ["q_proj"], "max_steps": 1, "prompt_template": "alpaca"}
    recipe.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    return recipe


def small_flags(folder: Path) -> list[str]:
    return [
        "--model_name_or_path", str(folder / "base"), "--dataset_name", str(folder / "alpaca.jsonl"),
        "--output_dir", str(folder / "out"), "--use_cpu", "true", "--max_steps", "1", "--report_to", "none",
        "--disable_tqdm", "true", "--per_device_train_batch_size", "2", "--max_length", "256",
    ]  # fmt: skip


def a_run(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """One step of `recipes/sft.py` on a damaged recipe, base or data file."""
    recipe = a_small_run(folder, whole)
    how = damage_file(draw.choice([recipe, folder / "base" / "model.safetensors", folder / "alpaca.jsonl"]), draw)
    sys.argv = ["recipes/sft.py", "--config", str(recipe), *small_flags(folder)]
    return how, lambda: runpy.run_path(str(ROOT / "recipes" / "sft.py"), run_name="__main__")


def report(command: list[str]) -> None:
    """Runs a verb that ends with 1 where what it reports is not as it should be."""
    try:
        main(command)
    except SystemExit as ended:
        if ended.code != 1:
            raise


def a_comparison(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """`plainlora compare` of what both load."""
    shutil.copytree(whole.adapter, folder / "adapter")
    how = damaged(folder / "adapter", whole, draw)
    return how, lambda: report(["compare", "--adapter", str(folder / "adapter"), "--prompt", "hi"])


def a_publication(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """What `plainlora push` makes of a folder before it logs in."""
    source = draw.choice([whole.adapter, whole.classifier, whole.base])
    shutil.copytree(source, folder / "result")
    how = damaged(folder / "result", whole, draw)
    return f"{how} ({source.name})", lambda: run_program(lambda: collect_publication(folder / "result", "ann/base"))


def a_record(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """`plainlora reproduce` up to the program that it would start, which is not there."""
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text(json.dumps(RUN | {"base": describe_base(str(whole.base), None)}))
    how = damage_file(folder / "run" / "run.json", draw)
    return how, lambda: main(["reproduce", str(folder / "run")])


def a_diagnosis(folder: Path, whole: Whole, draw: Draw) -> tuple[str, Callable[[], object]]:
    """`plainlora doctor` on a damaged recipe, base or data file."""
    recipe = a_small_run(folder, whole)
    how = damage_file(draw.choice([recipe, *sorted((folder / "base").iterdir()), folder / "alpaca.jsonl"]), draw)
    return how, lambda: report(["doctor", "--config", str(recipe), "--json", "--", *small_flags(folder)])


# The share of the cases that each takes; a diagnosis takes one second, a merge and a run take several.
DOORS: dict[Door, float] = {
    an_adapter: 0.2,
    a_classifier: 0.1,
    a_base: 0.13,
    a_recipe: 0.23,
    some_rows: 0.2,
    a_comparison: 0.02,
    a_publication: 0.05,
    a_record: 0.04,
    a_diagnosis: 0.02,
    a_run: 0.008,
    a_merge: 0.002,
}
if names := os.environ.get("PLAINLORA_FUZZ_DOORS"):
    DOORS = {door: 1.0 for door in DOORS if door.__name__ in names.split()}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises `Hang` after so many seconds."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(door: Door, run: Callable[[], object], folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """`well`, `refused`, or what is wrong with how it ended."""
    before, seconds = listing(folder), SECONDS.get(door.__name__, 20)
    capfd.readouterr()
    code: object = None
    try:
        with limited(seconds):
            run()
    except SystemExit as ended:
        code = ended.code
    except Hang:
        return f"no end after {seconds} s at {traceback.format_exc().splitlines()[-6:]}"
    except BaseException:  # a panic of a library written in Rust is no Exception
        return traceback.format_exc()
    if code is None:
        return "well"
    lines = without_progress(capfd.readouterr().err)
    several = len(lines) > 1 and door in (a_recipe, a_run, a_comparison)  # faults of a recipe are told at once
    if code != 2 or not (len(lines) == 1 or several) or not all(line.startswith("error: ") for line in lines):
        return f"exit code {code} with {lines}"
    if len(longest := max(lines, key=len)) > 1600:
        return f"a line of {len(longest)} letters: {longest[:300]}"
    after = listing(folder)
    if "training stopped" in lines[0]:  # it had begun
        after = {name: content for name, content in after.items() if not name.startswith("out")}
    if after != before:
        return f"left behind: {sorted(after.keys() ^ before.keys()) or 'other content'}"
    return f"refused: {lines[0]}"


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.filterwarnings("ignore:::transformers")
def test_u23_damaged_input_ends_well_or_in_one_line_and_leaves_nothing_half_written(
    whole: Whole, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    seconds: Counter[str] = Counter()
    environment = dict(os.environ)
    only = int(os.environ.get("PLAINLORA_FUZZ_ONLY", "-1"))
    for number in range(CASES) if only < 0 else [only]:
        draw = random.Random(f"{SEED} {number}")
        door = draw.choices(list(DOORS), list(DOORS.values()))[0]
        folder = tmp_path / "case"
        folder.mkdir()
        monkeypatch.chdir(folder)
        how, run = door(folder, whole, draw)
        started = time.monotonic()
        ended = outcome(door, run, folder, capfd)
        seconds[door.__name__] += time.monotonic() - started
        kind = ended.partition(":")[0]
        counts[door.__name__, kind if kind in ("well", "refused") else "badly"] += 1
        if kind not in ("well", "refused"):
            faults.append(f"case {number}, {door.__name__}, {how}:\n{ended}")
        os.environ.clear()
        os.environ.update(environment)
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    with capfd.disabled():
        print()
        for name in (door.__name__ for door in DOORS):
            found = {kind: counts[name, kind] for kind in ("well", "refused", "badly")}
            print(f"{name:>12} {found} {seconds[name]:.0f} s")
        for fault in faults if only >= 0 or "PLAINLORA_FUZZ" in os.environ else []:
            print(fault)
    assert not faults, "\n".join(faults[:5])
    assert (whole.outside).read_text() == "not yours"
    for door in (an_adapter, a_classifier, a_base, a_recipe, some_rows) if len(DOORS) > 5 and only < 0 else ():
        for kind in ("well", "refused"):
            assert counts[door.__name__, kind] > CASES / 100, f"{door.__name__}: too few end {kind} to say anything"
