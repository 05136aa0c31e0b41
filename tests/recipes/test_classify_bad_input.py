"""Bad input to the classification program: one line that says what to do, exit code 2, and nothing written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, BartConfig, BartModel, PreTrainedTokenizerFast

from plainlora.base import classifier
from tests.conftest import BACKBONES, TEXTS
from tests.recipes.conftest import RunClassify
from tests.refusals import snapshot, without_progress

Refused = Callable[..., str]


@pytest.fixture
def refused(run_classify: RunClassify, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """`refused("distilbert", "--flag", ...)`: runs recipes/classify.py in this process, and returns its one line."""

    def run(kind: str, *flags: str, name: str = "out") -> str:
        before, existed = snapshot(tmp_path), (tmp_path / name).exists()
        capfd.readouterr()
        with pytest.raises(SystemExit) as raised:
            run_classify(kind, name, *flags)
        lines = without_progress(capfd.readouterr().err)
        assert raised.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert snapshot(tmp_path) == before
        assert (tmp_path / name).exists() == existed
        return lines[0]

    return run


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a weight is a failure of the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(classifier, "load_pretrained", load)


def csv(path: Path, rows: list[tuple[str, object]], header: str = "text,label") -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n", encoding="utf-8")
    return str(path)


PAIRS = [(row["text"], row["label"]) for row in TEXTS]


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--method=full", "--load_in_4bit"],
            r"method full trains the base's own .* is not possible in 4 or 8 bits",
        ),
        (["--method=full", "--merge"], r"merge: method full leaves a whole model"),
        (["--method=last_layers", "--last_layers", "clasifier"], r"there is no module 'clasifier'; the last are"),
        (["--lora_head=true", "--train_head=true"], r"the head carries LoRA or is trained whole, not both"),
        (
            ["--lora_query=false", "--lora_value=false"],
            r"LoRA has no layer to adapt: switch projections on, .*--lora_query",
        ),
        (
            ["--lora_target_modules=q_lin"],
            r"lora_target_modules and lora_query: name modules or switch projections on",
        ),
        (
            ["--lora_config", '{"target_modules": ["q_lin"]}'],
            r"lora_config: target_modules and lora_query: name modules or switch projections on",
        ),
        (["--lora_task_type=TOKEN_CLS"], r"this program classifies sequences; leave it out"),
        (["--max_length=0"], r"max_length must be at least 1, not 0"),
        (["--max_length=1"], r"max_length: 1 has no place for text beside 2 special tokens"),
        (["--max_length=65"], r"max_length 65 is longer than the model's context of 64 tokens"),
        (["--validation_split_size=0"], r"eval_strategy needs validation rows: set validation_split_size"),
        (["--metric_for_best_model=nonsense"], r"there is no 'nonsense'; there are loss, accuracy, f1"),
        (["--metric_for_best_model=eval_f2"], r"there is no 'f2'; there are loss, accuracy, f1"),
        (["--save_strategy=best"], r"save_strategy best needs metric_for_best_model"),
        (["--load_best_model_at_end=true", "--eval_strategy=no"], r"load_best_model_at_end requires .* to match"),
        (
            ["--lora_layers_to_transform", "0", "9"],
            r"lora_layers_to_transform: there is no layer 9; the model has 0 t",
        ),
        (["--lora_exclude_modules", "v_ln"], r"exclude_modules: 'v_ln' matches no module; did you mean v_lin"),
        (['--lora_rank_pattern={"k_lin": 4}'], r"rank_pattern: 'k_lin' matches no target module"),
        (["--lora_modules_to_save", "clasifier"], r"modules_to_save: 'clasifier' matches no module; did you mean"),
        (
            ['--lora_config={"megatron_config": {"a": 1}}'],
            r"PEFT refuses this adapter: ModuleNotFoundError: .*megatron",
        ),
        (
            ["--adapter_dtype=bfloat16", "--train_head=true"],
            r"trained whole would not fit a base in float32; .*--bf16",
        ),
        (["--adapter_dtype=bfloat16", "--lora_bias=all"], r"adapter_dtype bfloat16: biases, heads and other modules"),
        (["--model_revision=v1"], r"model_revision v1: a local folder has no revisions"),
        (["--dataset_config=plain"], r"dataset_config plain: local files have no configurations"),
        (["--report_to=nonsense"], r"report_to: there is no tracker 'nonsense'"),
        (["--label_names", "x"], r"label_names is not supported: the column of classes is label_column"),
        (["--batch_eval_metrics=true"], r"batch_eval_metrics is not supported"),
        (["--prediction_loss_only=true"], r"prediction_loss_only is not supported"),
        (["--dataloader_drop_last=true"], r"dataloader_drop_last is not supported: every row is classified"),
        (["--eval_do_concat_batches=false"], r"eval_do_concat_batches is not supported"),
        (["--use_liger_kernel=true"], r"use_liger_kernel is not supported: its kernels are for causal"),
        (["--dataloader_num_workers=-1"], r"dataloader_num_workers must be at least 0, not -1"),
        (["--resume_from_checkpoint=gone"], r"gone is not a checkpoint folder; it has no trainer_state.json"),
        (["--labels", "ham"], r"a classifier needs two"),
        (["--labels", "Ham", "spam"], r"'label' is 'ham', expected 'Ham' \(only the case differs\)"),
        (["--text_column=sms"], r"and no 'sms'; set --text_column, or, if the file has no header line"),
    ],
)
def test_a_bad_setting_is_refused_before_a_weight_is_loaded(refused: Refused, flags: list[str], said: str) -> None:
    assert re.search(said, refused("distilbert", *flags))


@pytest.mark.parametrize("backend", ["fused", "reference", "peft"])
def test_u22_what_the_settings_alone_rule_out_is_refused_before_rows_are_read(
    refused: Refused, tmp_path: Path, backend: str
) -> None:
    (tmp_path / "rows.csv").write_text("no rows")
    unread = ["--dataset_name", str(tmp_path / "rows.csv"), "--lora_backend", backend]
    assert "'use_dra' is not a field of peft.LoraConfig" in refused(
        "distilbert", *unread, '--lora_config={"use_dra": 1}'
    )
    none = ["--lora_query=false", "--lora_value=false"]
    assert "LoRA has no layer to adapt" in refused("distilbert", *unread, *none)


@pytest.mark.parametrize("targets", ["all-linear", ".*q_lin"])
def test_layers_are_numbered_for_names_not_for_a_pattern(refused: Refused, targets: str) -> None:
    off = ["--lora_query=false", "--lora_value=false", "--lora_layers_to_transform=1"]
    said = refused("distilbert", *off, f"--lora_target_modules={targets}")
    assert f"lora_layers_to_transform needs names of modules, not the pattern '{targets}'" in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("x", "maybe"), r"row 121: 'label' is 'maybe', expected one of ham \(0\), spam \(1\)"),
        (("x", ""), r"row 121: 'label' is '', expected one of"),
        (("x", 1.0), r"row 121: 'label' is '1.0', expected one of"),
        (("", "ham"), r"row 121: 'text' is empty; fix the row, or set on_empty to drop"),
        (("a,b", "ham"), r"line 122: 3 fields, the header has 2"),
    ],
)
def test_a_bad_row_is_named(refused: Refused, tmp_path: Path, row: tuple[str, object], said: str) -> None:
    rows = csv(tmp_path / "rows.csv", [*PAIRS, row])
    assert re.search(said, refused("distilbert", "--dataset_name", rows, "--on_empty", "error"))


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_part_without_one_of_the_classes_is_refused(refused: Refused, tmp_path: Path, part: str) -> None:
    ham = [pair for pair in PAIRS if pair[1] == "ham"]
    for name in ("train", "validation", "test"):
        csv(tmp_path / "rows" / f"{name}.csv", ham if name == part else PAIRS)
    said = refused("distilbert", "--dataset_name", str(tmp_path / "rows"))
    assert f"{part}.csv as {part} rows: no row of the class spam" in said


@pytest.mark.parametrize("flag", ["--validation_dataset_name", "--eval_dataset_name"])
def test_rows_are_not_trained_on_and_tested_on(refused: Refused, texts_file: Path, flag: str) -> None:
    part = "validation" if flag.startswith("--v") else "test"
    said = refused("distilbert", flag, str(texts_file))
    assert f"texts.csv holds the train rows and the {part} rows; give other rows for one of them" in said


def test_one_file_is_not_both_validation_and_test(refused: Refused, tmp_path: Path) -> None:
    rows = csv(tmp_path / "more.csv", PAIRS)
    said = refused("distilbert", "--validation_dataset_name", rows, "--eval_dataset_name", rows)
    assert "more.csv holds the validation rows and the test rows" in said


def base(folder: Path, backbone: Path, classes: int | None = None) -> Path:
    """A base folder to spoil; with `classes`, one that is a classifier already."""
    shutil.copytree(backbone, folder)
    if classes:
        config = BACKBONES["distilbert"]()
        config.num_labels = classes
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def test_bases_that_will_not_do(refused: Refused, tmp_path: Path, backbone_dirs: dict[str, Path]) -> None:
    backbone = backbone_dirs["distilbert"]
    three = base(tmp_path / "three", backbone, 3)
    assert "is a classifier of 3 classes already, the data has 2 (ham, spam)" in refused(
        "distilbert", "--model_name_or_path", str(three)
    )
    cut = base(tmp_path / "cut", backbone)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    assert "cut/model.safetensors is cut short or damaged (" in refused("distilbert", "--model_name_or_path", str(cut))
    speechless = base(tmp_path / "speechless", backbone)
    for file in speechless.glob("token*"):
        file.unlink()
    assert "speechless holds no tokenizer, or one without a vocabulary" in refused(
        "distilbert", "--model_name_or_path", str(speechless)
    )
    adapter = base(tmp_path / "adapter", backbone)
    (adapter / "adapter_config.json").write_text("{}")
    assert "is or holds an adapter, not a base model alone" in refused(
        "distilbert", "--model_name_or_path", str(adapter)
    )


def test_an_encoder_decoder_needs_the_end_that_its_head_reads(
    refused: Refused, tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=320, max_position_embeddings=64,
    )  # fmt: skip
    BartModel(config).save_pretrained(tmp_path / "bart")
    word_tokenizer.save_pretrained(tmp_path / "bart")
    said = refused("distilbert", "--model_name_or_path", str(tmp_path / "bart"), "--method", "full")
    assert "the head of bart models reads the token 2 at the end of a text" in said


def saved(folder: Path) -> set[str]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors.keys()}  # noqa: SIM118


def test_a_base_with_its_own_head_gives_the_adapter_nothing_to_save(
    run_classify: RunClassify, tmp_path: Path, backbone_dirs: dict[str, Path]
) -> None:
    two = base(tmp_path / "two", backbone_dirs["distilbert"], 2)
    output = run_classify("distilbert", "run", "--model_name_or_path", str(two))
    assert not any("classifier" in name for name in saved(output))
    assert "The head is the base's own, and PEFT loads it too" in (output / "README.md").read_text()


def test_a_causal_language_model_gets_a_new_head(run_classify: RunClassify, model_dirs: dict[str, Path]) -> None:
    output = run_classify("distilbert", "run", "--model_name_or_path", str(model_dirs["llama"]), "--max_length", "64")
    assert "score.weight" in saved(output)


@pytest.mark.parametrize("kind", BACKBONES)
def test_layers_to_transform_is_honoured_by_kinds_and_spares_the_head(run_classify: RunClassify, kind: str) -> None:
    kinds = [f"--lora_{name}=true" for name in ("query", "key", "value", "projection", "mlp", "head")]
    found = saved(run_classify(kind, "run", *kinds, "--lora_layers_to_transform", "1"))
    assert any(".1." in name for name in found)
    assert not any(".0." in name for name in found)
    heads = {"distilbert": {"pre_classifier", "classifier"}, "bert": {"bert.pooler.dense", "classifier"}}
    assert heads.get(kind, {"score"}) <= found


@pytest.mark.parametrize("backend", ["reference", "peft"])
def test_figures_before_training_are_those_of_the_base_whatever_biases_are_trained(
    run_classify: RunClassify, capfd: pytest.CaptureFixture[str], backend: str
) -> None:
    figures = []
    for bias in ("none", "all"):
        flags = ["--lora_bias", bias, "--lora_backend", backend, "--learning_rate", "0.05"]
        output = run_classify("distilbert", bias, *flags)
        figures.append(json.loads((output / "all_results.json").read_text())["test_loss_base"])
    assert figures[0] == figures[1]
    assert "Careful" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "full"], r"holds an adapter, which method full cannot resume"),
        (["--lora_r", "4"], r"was trained with r 8, now it is 4"),
        (["--lora_mlp", "true"], r"was trained with lora_mlp False, now it is True"),
        (["--lora_layers_to_transform", "1"], r"was trained with lora_layers_to_transform None, now it is \[1\]"),
        (["--lora_exclude_modules", "v_lin"], r"was trained with lora_exclude_modules None, now it is \['v_lin'\]"),
        (["--labels", "spam", "ham"], r"was trained with labels \['ham', 'spam'\], now it is \['spam', 'ham'\]"),
        (["--seed", "7"], r"was trained with seed 42, now it is 7"),
        (["--test_split_size", "30"], r"was trained with test_split_size 20.0, now it is 30.0"),
    ],
)
def test_an_adapter_is_resumed_with_its_own_settings_only(
    run_classify: RunClassify, refused: Refused, tmp_path: Path, flags: list[str], said: str
) -> None:
    run_classify("distilbert", "run", "--max_steps", "3")
    assert re.search(said, refused("distilbert", "--resume_from_checkpoint", "true", *flags, name="run"))
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    said = refused("distilbert", "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3"), name="run")
    assert "checkpoint-3 is not whole: trainer_state.json names no global_step; give another checkpoint" in said


def test_a_whole_model_is_resumed_with_its_own_settings_only(
    run_classify: RunClassify, refused: Refused, tmp_path: Path, backbone_dirs: dict[str, Path]
) -> None:
    output = run_classify("distilbert", "run", "--method", "full", "--max_steps", "3")
    go_on = ["--method", "full", "--resume_from_checkpoint", str(output / "checkpoint-3")]
    for flags, said in (
        (["--method", "lora"], "holds a whole model, which method lora cannot resume"),
        (["--method", "last_layers"], "was trained with method full, now it is last_layers"),
        (["--model_name_or_path", str(backbone_dirs["bert"])], "was trained with model_name_or_path"),
    ):
        assert said in refused("distilbert", *go_on, *flags, name="run")
    (output / "run.json").unlink()  # the classes stand in the model's own config too
    assert "was trained with labels ['ham', 'spam']" in refused(
        "distilbert", *go_on, "--labels", "spam", "ham", name="run"
    )
    with pytest.raises(SystemExit):  # the rest is noticed by the optimizer alone, when the run's folder is there
        run_classify("distilbert", "other", *go_on, "--method", "last_layers")
    assert (output / "checkpoint-3").is_dir()


def test_a_run_that_diverges_says_so(run_classify: RunClassify, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        run_classify("distilbert", "run", "--learning_rate", "1e10", "--max_steps", "10", "--save_steps", "1")
    assert raised.value.code == 2
    assert re.search(
        r"error: the loss of step 3 is nan, on rows \d+ .*, so training stopped; .*checkpoint-2 is kept",
        capfd.readouterr().err,
    )
    # In the last step, after which there is no loss of a next one to look at: the weights are looked at.
    with pytest.raises(SystemExit) as raised:
        run_classify("distilbert", "whole", "--method", "full", "--learning_rate", "1e38", "--max_steps", "1")
    assert raised.value.code == 2
    assert re.search(
        r"error: \S+ holds values that are not finite, so the model was not saved;", capfd.readouterr().err
    )


def test_a_folder_that_is_not_free(refused: Refused, tmp_path: Path) -> None:
    rows = csv(tmp_path / "rows" / "train.csv", PAIRS)
    folder = str(Path(rows).parent)
    said = refused("distilbert", "--dataset_name", folder, "--output_dir", folder, name="rows")
    assert f"is or holds the dataset {folder}" in said
    said = refused("distilbert", "--output_dir", str(Path(rows) / "below"))
    assert "train.csv is a file; give a folder" in said
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    assert "holds another run (run.json)" in refused("distilbert")
    assert "is not an option" in refused("distilbert", "--overwrite", "--lora_querry", "true")


@pytest.mark.parametrize(
    ("flags", "head"),
    [
        ([], "The head is saved with the adapter, because the base has none, and PEFT loads it too:"),
        (
            ["--lora_head", "true"],
            "because the base has none, and carries LoRA too. Load it with PEFT as below, not with",
        ),
        (["--train_head", "true"], "The trained head is saved with the adapter, and PEFT loads both:"),
    ],
    ids=["frozen", "lora", "whole"],
)
def test_the_card_s_code_runs_and_what_it_says_of_the_head_is_so(
    run_classify: RunClassify, tmp_path: Path, flags: list[str], head: str
) -> None:
    rows = csv(tmp_path / "three.csv", [(text, "abc"[at % 3]) for at, (text, _) in enumerate(PAIRS)])
    output = run_classify("distilbert", "run", "--dataset_name", rows, "--labels", "a", "b", "c", *flags)
    card = (output / "README.md").read_text()
    assert head in card
    code = card.split("```python")[1].split("```")[0].replace("PATH OR HUB ID OF THIS MODEL", str(output))
    names: dict[str, object] = {}
    torch.manual_seed(99)
    exec(code, names)  # what a reader would paste
    model, tokenizer = names["model"].eval(), names["tokenizer"]  # type: ignore[attr-defined]
    results = json.loads((output / "all_results.json").read_text())
    assert results["test_rows"] == sum(map(sum, results["test_confusion"]))
    with torch.no_grad():
        answer = model(**tokenizer("win a big prize", return_tensors="pt")).logits.softmax(-1)
    assert answer.shape == (1, 3)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_pattern_of_targets_stands_in_the_card_as_it_was_typed(run_classify: RunClassify) -> None:
    off = ["--lora_query", "false", "--lora_value", "false"]
    output = run_classify("distilbert", "run", *off, "--lora_target_modules", ".*q_lin")
    assert "| target modules | .*q_lin |" in (output / "README.md").read_text()
