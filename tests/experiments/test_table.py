"""`plainlora table`: which variants, which figures, and the real program on a tiny DistilBERT."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from plainlora.commands import main
from plainlora.errors import UserError
from plainlora.experiments.runs import run_recipe
from plainlora.experiments.scores import Score
from plainlora.experiments.table import Variant, find_variants, mean_and_half_width
from tests.conftest import ROOT


def write_recipe(path: Path, backbone: Path, texts: Path, **changes: object) -> Path:
    """A recipe that takes no time, with nothing wrong."""
    content = {
        "model_name_or_path": str(backbone), "dataset_name": str(texts), "labels": ["ham", "spam"],
        "lora_query": True, "lora_value": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 5e-4,
        "validation_split_size": 20, "test_split_size": 40, "max_steps": 4, "use_cpu": True, "save_strategy": "steps",
        "save_steps": 2, "output_dir": "never-used",
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content | changes))
    return path


def folder_of(folder: Path, **methods: str) -> str:
    """YAML files with these methods; the path of the first."""
    for name, method in methods.items():
        (folder / f"{name}.yaml").write_text(f"text_column: text\nmethod: {method or 'lora'}\n")
    return str(folder / f"{next(iter(methods))}.yaml")


def test_one_config_stands_for_its_folder_in_a_fixed_order(tmp_path: Path) -> None:
    given = folder_of(tmp_path, lora="", zoo="full", full="full", lora_b="lora", bar="lora", last_layers="last_layers")
    (tmp_path / "notes.txt").write_text("not a recipe")
    variants = find_variants([given])
    assert [variant.name for variant in variants] == ["last_layers", "lora", "lora_b", "full", "bar", "zoo"]
    assert all(variant == Variant(variant.name, str(tmp_path / f"{variant.name}.yaml")) for variant in variants)


def test_methods_that_the_folder_lacks_are_the_given_config_with_a_flag(tmp_path: Path) -> None:
    given = folder_of(tmp_path, lora="")
    assert find_variants([given]) == [
        Variant("last_layers", given, ("--method=last_layers",)),
        Variant("lora", given),
        Variant("full", given, ("--method=full",)),
    ]


def test_an_added_method_never_takes_the_name_of_a_file(tmp_path: Path) -> None:
    given = folder_of(tmp_path, full="lora", last_layers="last_layers")
    assert [(variant.name, variant.flags) for variant in find_variants([given])] == [
        ("last_layers", ()),
        ("full", ()),
        ("full-full", ("--method=full",)),
    ]


def test_no_method_that_trains_the_bases_weights_is_added_to_a_recipe_in_4_or_8_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = folder_of(tmp_path, lora="")
    for flags, names in (
        (("--load_in_4bit", "true"), ["lora"]),
        (("--load_in_4bit", "false"), ["last_layers", "lora", "full"]),
    ):
        assert [variant.name for variant in find_variants([given], flags)] == names
    said = capsys.readouterr().out
    assert said == (
        f"last_layers, full: not compared, as {given} sets load_in_4bit, and these train the base's own weights\n"
    )


def test_several_configs_are_compared_as_they_are(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (folder_of(tmp_path / name, lora="lora", full="full") for name in ("one", "two"))
    assert find_variants([two, one]) == [Variant("two-lora", two), Variant("one-lora", one)]
    assert [variant.name for variant in find_variants([one, one.replace("lora", "full")])] == ["lora", "full"]
    with pytest.raises(UserError, match="one-lora is given twice"):
        find_variants([one, one])


def test_recipes_of_both_programs_are_refused_before_a_run() -> None:
    imdb, instruct = "recipes/distilbert-imdb/lora.yaml", "recipes/instruct/lora.yaml"
    with pytest.raises(
        UserError, match=rf"{imdb} is a recipe of recipes/classify\.py and {instruct} of recipes/sft\.py"
    ):
        find_variants([imdb, instruct])


def test_the_recipes_of_this_repository() -> None:
    imdb = find_variants(["recipes/distilbert-imdb/lora.yaml"])
    assert [variant.name for variant in imdb] == ["last_layers", "lora", "lora_best", "full"]
    assert not any(variant.flags for variant in imdb)
    assert [variant.name for variant in find_variants(["recipes/gpt2-sms-spam/lora.yaml"])] == [
        "last_layers",
        "lora",
        "full",
    ]


def test_the_interval_is_students() -> None:
    # Quantiles of t for 97.5 %, from printed tables: 1, 2 and 9 degrees of freedom.
    for count, quantile in ((2, 12.7062), (3, 4.3027), (10, 2.2622)):
        values = np.random.default_rng(count).normal(0.9, 0.02, count)
        mean, half_width = mean_and_half_width(values.tolist())
        assert mean == pytest.approx(values.sum() / count)
        variance = ((values - values.mean()) ** 2).sum() / (count - 1)
        assert half_width == pytest.approx(quantile * (variance / count) ** 0.5, rel=1e-4)
    assert mean_and_half_width([0.5]) == (0.5, None)


@pytest.mark.parametrize(
    ("share", "half_width", "shown"),
    [
        (0.93123, None, "93.1"),
        (0.93123, 0.0, "93.1 ± 0"),
        (0.93123, 0.0034, "93.1 ± 0.3"),
        (0.93123, 0.00134, "93.12 ± 0.13"),
        (0.93123, 0.034, "93 ± 3"),
        (0.93123, 0.0134, "93.1 ± 1.3"),
        (0.93123, 0.134, "93 ± 13"),
        (0.93123, 0.00001, "93.12 ± 0.00"),
    ],
)
def test_no_more_digits_than_the_interval_leaves(share: float, half_width: float | None, shown: str) -> None:
    assert Score("test_accuracy", "test accuracy").show(share, half_width) == shown


def fail(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """What the command printed before its error, and its one line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capfd.readouterr()
    assert ended.value.code == 2
    line = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1
    return printed.out, line[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "1", "1"], r"--seeds are different whole numbers from 0, not 1 1"),
        (["--seeds", "-1"], r"--seeds are different whole numbers from 0, not -1"),
        (["--", "--method", "full"], r"--method cannot stand after the --: every method is compared; to compare some"),
        (["--", "--seed", "3"], r"--seed cannot stand after the --: use --seeds"),
        (["--output_dir", ""], r"--output_dir is empty; give a folder"),
    ],
)
def test_bad_arguments_run_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
) -> None:
    given = folder_of(tmp_path, lora="")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    printed, line = fail(capfd, "table", "--config", given, *arguments)
    assert re.search(said, line)
    assert printed == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.yaml", "recipes"]


def test_a_failing_run_loses_no_other_and_a_finished_one_is_not_run_again(
    backbone_dirs: dict[str, Path], texts_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = {
        "push_to_hub": True,
        "hub_token": "hf_secret",
        "env": {"A": "1"},
    }  # nothing is published
    recipe = write_recipe(tmp_path / "tiny" / "lora.yaml", backbone_dirs["distilbert"], texts_file, **own)
    broken = write_recipe(tmp_path / "tiny" / "z.yaml", backbone_dirs["distilbert"], texts_file, lora_rank=4)
    output = tmp_path / "out"
    command = ["table", "--config", recipe, broken, "--seeds", 0, "--output_dir", output]
    command += ["--", "--weight_decay=0.01", "--hub_token=hf_secret"]
    printed, line = fail(capfd, *command)
    assert "1 of 2 runs failed, the first of them z with seed 0: " in line
    assert "lora_rank is not an option; did you mean lora_r?" in line
    assert f"(log: {output / 'z-seed0.log'})" in line
    assert re.search(r"^1/2  lora  seed 0  test accuracy \d+\.\d%", printed, re.MULTILINE)
    assert re.search(r"^2/2  z  seed 0  failed: ", printed, re.MULTILINE)
    assert "Failed: z with seed 0" in (output / "table.md").read_text()
    first = json.loads((output / "table.json").read_text())
    assert [run["variant"] for run in first["runs"]] == ["lora"]
    assert [failure["variant"] for failure in first["failures"]] == ["z"]
    arguments = json.loads((output / "lora-seed0" / "run.json").read_text())["arguments"]
    assert (arguments["seed"], arguments["weight_decay"], arguments["lora_r"]) == (0, 0.01, 4)
    assert not list(output.glob("*/checkpoint-*"))
    assert not [file for file in output.rglob("*") if file.is_file() and b"hf_secret" in file.read_bytes()]

    # The broken one is mended: only what is missing runs.
    write_recipe(broken, backbone_dirs["distilbert"], texts_file, method="full")
    before = (output / "lora-seed0" / "run.json").stat().st_mtime_ns
    main([str(word) for word in command])
    printed = capfd.readouterr().out
    assert len(re.findall(r"\(finished before\)", printed)) == 1
    assert (output / "lora-seed0" / "run.json").stat().st_mtime_ns == before
    table = json.loads((output / "table.json").read_text())
    assert table["failures"] == []
    assert [variant["variant"] for variant in table["variants"]] == ["lora", "z"]
    results = json.loads((output / "z-seed0" / "all_results.json").read_text())
    variant = table["variants"][1]
    assert (variant["method"], variant["test_accuracy"], variant["test_accuracy_half_width"]) == (
        "full", results["test_accuracy"], None,
    )  # fmt: skip
    assert variant["trainable_params"] == variant["total_params"]
    assert table["versions"]["torch"]
    assert (output / "table.md").read_text().split("\n\n")[0] in printed
    assert (output / "table.png").read_bytes().startswith(b"\x89PNG")

    # Another flag is another run. This one is refused, and nothing vouches for the results of the first any more.
    with pytest.raises(UserError, match=r"max_length 9999 is longer than the model's context .*lora-seed0.log\)"):
        run_recipe(str(recipe), ["--weight_decay=0.01", "--seed=0", "--max_length=9999"], output / "lora-seed0")
    assert not (output / "lora-seed0" / "command.json").exists()


def test_the_settings_of_an_adapter_are_left_out_of_methods_that_train_none(
    model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = {
        "model_name_or_path": str(model_dirs["qwen2"]), "dataset_name": str(rows_file), "test_split_size": 8,
        "prompt_template": "alpaca", "lora_target_modules": "all-linear", "max_steps": 1, "max_length": 256,
        "lora_config": {"init_lora_weights": "orthogonal"}, "loraplus_lr_ratio": 4.0, "save_strategy": "no",
        "use_cpu": True, "precision": "fp32", "output_dir": "never-used",
    }  # fmt: skip
    recipe, output = tmp_path / "tiny" / "lora.yaml", tmp_path / "out"
    recipe.parent.mkdir()
    recipe.write_text(yaml.safe_dump(content))
    main(["table", "--config", str(recipe), "--seeds", "0", "--output_dir", str(output)])
    first, *_ = capfd.readouterr().out.splitlines()
    assert first == (
        f"last_layers, full: train no adapter, so lora_config, loraplus_lr_ratio of {recipe} are left out of them"
    )
    trained = json.loads((output / "table.json").read_text())
    assert [row["variant"] for row in trained["variants"]] == ["last_layers", "lora", "full"]
    assert trained["failures"] == []
    left = {
        row["variant"]: json.loads((output / f"{row['variant']}-seed0" / "run.json").read_text())
        for row in trained["variants"]
    }
    assert [left[name]["arguments"]["loraplus_lr_ratio"] for name in ("last_layers", "lora", "full")] == [
        None,
        4.0,
        None,
    ]
    assert yaml.safe_load(recipe.read_text()) == content


def test_a_setting_of_adapters_for_every_run_is_refused_where_a_method_trains_none(tmp_path: Path) -> None:
    given = folder_of(tmp_path, lora="")
    flags = ["--loraplus_lr_ratio", "16"]
    with pytest.raises(
        UserError, match=r"--loraplus_lr_ratio cannot stand after the --: last_layers, full train no adapter"
    ):
        find_variants([given], flags)
    other = folder_of(tmp_path, lora_b="lora")
    assert [variant.name for variant in find_variants([given, other], flags)] == ["lora", "lora_b"]


def test_language_models_are_compared_by_test_loss_and_exact_matches(
    model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = {
        "model_name_or_path": str(model_dirs["qwen2"]), "dataset_name": str(rows_file), "test_split_size": 8,
        "prompt_template": "alpaca", "lora_target_modules": "all-linear", "learning_rate": 5e-3, "max_steps": 3,
        "exact_match_rows": 2, "max_new_tokens": 2, "max_length": 256, "merge": True, "use_cpu": True,
        "precision": "fp32", "output_dir": "never-used",
    }  # fmt: skip
    for method in ("lora", "full"):
        (tmp_path / f"{method}.yaml").write_text(yaml.safe_dump(content | {"method": method}))
    output, recipes = tmp_path / "out", [str(tmp_path / f"{method}.yaml") for method in ("lora", "full")]
    main(["table", "--config", *recipes, "--seeds", "0", "1", "--output_dir", str(output)])
    assert re.search(r"(?m)^1/4  lora  seed 0  test loss \d\.\d{3}  \d+ s of training", capfd.readouterr().out)
    table = json.loads((output / "table.json").read_text())
    assert [row["variant"] for row in table["variants"]] == ["lora", "full"]
    for row in table["variants"]:
        folders = [output / f"{row['variant']}-seed{seed}" for seed in (0, 1)]
        runs = [json.loads((folder / "all_results.json").read_text()) for folder in folders]
        losses = [run["eval_loss_adapter" if row["variant"] == "lora" else "eval_loss"] for run in runs]
        mean, half_width = mean_and_half_width(losses)
        assert (row["eval_loss"], row["eval_loss_half_width"]) == (mean, half_width)
        assert row["exact_match"] == 0
        assert row["trainable_params"] == runs[0]["trainable_params"]
        assert not (folders[0] / "merged").exists()
    header, *lines = (output / "table.md").read_text().splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns[:4] == ["variant", "test loss", "exact match, %", "trained parameters"]
    assert " ± " in lines[1]
    assert (output / "table.png").read_bytes().startswith(b"\x89PNG")
