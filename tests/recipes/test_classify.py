"""The classification program: every method and back end, what it leaves, and that a reload predicts the same."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, pipeline

from plainlora.backends import BACKENDS
from plainlora.commands import main
from plainlora.prediction import classify, load_trained_classifier
from tests.conftest import BACKBONES, ROOT, TEXTS
from tests.recipes.conftest import RunClassify

GPT2 = "recipes/gpt2-sms-spam/lora.yaml"
METHODS = ["lora", "last_layers", "full"]


def results(folder: Path) -> dict[str, object]:
    return json.loads((folder / "all_results.json").read_text())


def weights(folder: Path) -> bytes:
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    return (folder / name).read_bytes()


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("head", ["frozen", "lora", "trained"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_the_hand_written_lora_trains_the_very_classifier_that_peft_trains(
    run_classify: RunClassify, kind: str, head: str
) -> None:
    kinds = [flag for name in ("query", "key", "value", "mlp") for flag in (f"--lora_{name}", "true")]
    flags = {"frozen": [], "lora": ["--lora_head", "true"], "trained": ["--train_head", "true"]}[head]
    flags = [*kinds, *flags, "--lora_dropout", "0.1", "--lora_backend"]
    ours = run_classify(kind, "ours", *flags, "reference")
    theirs = run_classify(kind, "theirs", *flags, "peft")
    assert len(losses(ours)) == 6
    assert losses(ours) == losses(theirs)
    assert weights(ours) == weights(theirs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_every_method_learns_and_reports_what_it_did(run_classify: RunClassify, kind: str, method: str) -> None:
    flags = ["--max_steps", "60", "--eval_steps", "20", "--save_steps", "60", "--lora_key", "true"]
    rate = ["--learning_rate", "2e-2" if method != "full" else "2e-3"]
    output = run_classify(kind, "run", "--method", method, *flags, *rate)
    found = results(output)
    assert found["test_loss"] < found["test_loss_base"]
    if method != "last_layers":  # whose backbone is random here
        assert found["test_accuracy"] > 0.8 > found["test_accuracy_base"]
    assert found["method"] == method
    for split, rows in (("training", 80), ("validation", 20), ("test", 20)):
        assert found[f"{split}_rows"] == rows == sum(map(sum, found[f"{split}_confusion"]))
        for suffix in ("", "_base"):  # accuracy and F1 follow from the table alone
            (ham, ham_as_spam), (spam_as_ham, spam) = found[f"{split}_confusion{suffix}"]
            truth = [0] * (ham + ham_as_spam) + [1] * (spam_as_ham + spam)
            said = [0] * ham + [1] * ham_as_spam + [0] * spam_as_ham + [1] * spam
            assert found[f"{split}_accuracy{suffix}"] == pytest.approx(accuracy_score(truth, said))
            assert found[f"{split}_f1{suffix}"] == pytest.approx(f1_score(truth, said, zero_division=0.0))
    assert found["train_runtime"] > 0
    assert found["train_loss"] == pytest.approx(sum(losses(output)) / len(losses(output)), rel=1e-3)  # Trainer's own
    assert 1e8 < found["peak_memory_bytes"] < 1e11
    for name in ("confusion.png", "loss.png"):
        assert (output / name).read_bytes()[1:4] == b"PNG"
    run = json.loads((output / "run.json").read_text())
    assert run["labels"] == ["ham", "spam"]
    assert run["arguments"]["method"] == method
    card = ModelCard.load(output / "README.md").data
    assert card.pipeline_tag == "text-classification"
    assert card.library_name == ("peft" if method == "lora" else "transformers")


@pytest.mark.parametrize(
    "flags", [[], ["--lora_head", "true"], ["--train_head", "true"]], ids=["frozen", "lora", "whole"]
)
@pytest.mark.parametrize("backend", ["fused", "reference", "peft"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_u20_a_reloaded_adapter_predicts_the_same_here_and_in_peft(
    run_classify: RunClassify, kind: str, backend: str, flags: list[str]
) -> None:
    mlp = ["--lora_query", "false", "--lora_value", "false", "--lora_mlp", "true"]
    output = run_classify(kind, "run", *mlp, *flags, "--lora_backend", backend, "--measured_train_rows", "80")
    expected = results(output)
    texts = [row["text"] for row in TEXTS]
    torch.manual_seed(99)  # the head of a freshly loaded base is another one
    ours = classify(load_trained_classifier(output, BACKENDS["reference"]), texts)
    torch.manual_seed(98)
    theirs = classify(load_trained_classifier(output, BACKENDS["peft"]), texts)
    assert ours == theirs
    # A stranger, with what the model card says and nothing of this package.
    run = json.loads((output / "run.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(output)
    torch.manual_seed(97)
    base = AutoModelForSequenceClassification.from_pretrained(
        run["arguments"]["model_name_or_path"], id2label={0: "ham", 1: "spam"}, pad_token_id=tokenizer.pad_token_id
    )
    model = PeftModel.from_pretrained(base, str(output)).eval()
    for text, shares in zip(texts[:10], ours, strict=False):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        torch.testing.assert_close(alone, torch.tensor(shares), rtol=1e-4, atol=1e-6)
    said = ["spam" if spam > ham else "ham" for ham, spam in ours]
    right = sum(row["label"] == answer for row, answer in zip(TEXTS, said, strict=True))
    measured = sum(
        expected[f"{split}_accuracy"] * expected[f"{split}_rows"] for split in ("training", "validation", "test")
    )
    assert right == round(measured)


@pytest.mark.parametrize("method", ["last_layers", "full"])
def test_a_whole_model_loads_with_plain_transformers_and_predicts_the_same(
    run_classify: RunClassify, method: str
) -> None:
    output = run_classify("gpt2", "run", "--method", method, config=GPT2)
    ask = pipeline("text-classification", str(output), device="cpu")
    trained = load_trained_classifier(output, BACKENDS["reference"])
    assert trained.labels == ["ham", "spam"]
    for row, shares in zip(TEXTS[:5], classify(trained, [row["text"] for row in TEXTS[:5]]), strict=True):
        answer = ask(row["text"])[0]
        assert answer["score"] == pytest.approx(max(shares), rel=1e-4)
        assert answer["label"] == ["ham", "spam"][shares.index(max(shares))]


def test_last_layers_trains_these_and_leaves_every_other_weight_as_it_was(run_classify: RunClassify) -> None:
    output = run_classify("distilbert", "run", "--method", "last_layers")
    run = json.loads((output / "run.json").read_text())
    after = AutoModelForSequenceClassification.from_pretrained(output).state_dict()
    before = AutoModelForSequenceClassification.from_pretrained(run["arguments"]["model_name_or_path"]).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{layer}.{kind}" for layer in ("pre_classifier", "classifier") for kind in ("weight", "bias")}
    only = run_classify("distilbert", "only", "--method", "last_layers", "--last_layers", "classifier")
    assert results(only)["trainable_params"] == 2 * 64 + 2


@pytest.mark.parametrize("method", METHODS)
def test_a_base_without_dropout_is_what_training_sees_and_nothing_that_is_saved(
    run_classify: RunClassify, backbone_dirs: dict[str, Path], tmp_path: Path, method: str
) -> None:
    config = json.loads((backbone_dirs["distilbert"] / "config.json").read_text())
    own = {name: value for name, value in config.items() if "dropout" in name and not isinstance(value, bool)}
    assert {"attention_dropout", "dropout", "seq_classif_dropout"} <= own.keys()
    assert all(own.values())
    without = shutil.copytree(backbone_dirs["distilbert"], tmp_path / "without")
    (without / "config.json").write_text(json.dumps(config | dict.fromkeys(own, 0.0)))

    set_ = run_classify("distilbert", "set", "--method", method, "--base_dropout", "0")
    never_there = run_classify("distilbert", "never", "--method", method, "--model_name_or_path", str(without))
    assert weights(set_) == weights(never_there)
    assert losses(set_) != losses(run_classify("distilbert", "left", "--method", method))
    for saved in set_.rglob("config.json"):
        content = json.loads(saved.read_text())
        assert {name: content[name] for name in own} == own
    assert bool(list(set_.rglob("checkpoint-6/config.json"))) == (method != "lora")


@pytest.mark.parametrize("side", ["left", "right"])
def test_u20_a_tuned_decoder_reads_the_last_real_token_on_either_side(run_classify: RunClassify, side: str) -> None:
    output = run_classify("gpt2", "run", "--merge", config=GPT2)
    tokenizer = AutoTokenizer.from_pretrained(output / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(output / "merged").eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    texts = ["win a prize now", "see you very very very soon at 7"]
    tokenizer.padding_side = side
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch, position_ids=positions).logits
        alone = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["distilbert", "gpt2"])
def test_u09_a_run_that_trains_the_head_whole_may_be_resumed(run_classify: RunClassify, backbone: str) -> None:
    """The saved config also names the heads that PEFT adds for the task."""
    flags = ["--train_head", "true", "--lora_key", "true", "--max_steps", "8", "--save_steps", "4"]
    whole = run_classify(backbone, "whole", *flags)
    shutil.copytree(whole / "checkpoint-4", whole.parent / "resumed" / "checkpoint-4")
    resumed = run_classify(backbone, "resumed", *flags, "--resume_from_checkpoint", "true")
    assert weights(resumed) == weights(whole)


@pytest.mark.parametrize("method", METHODS)
def test_u09_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    run_classify: RunClassify, method: str
) -> None:
    # 80 rows in batches of 8: step 14 lies in the second epoch, whose order must be drawn as if nothing had happened.
    flags = ["--method", method, "--max_steps", "24", "--save_steps", "14", "--lora_dropout", "0.1"]
    whole = run_classify("distilbert", "whole", *flags)
    shutil.copytree(whole / "checkpoint-14", whole.parent / "resumed" / "checkpoint-14")
    resumed = run_classify("distilbert", "resumed", *flags, "--resume_from_checkpoint", "true")
    assert losses(resumed) == losses(whole)
    assert weights(resumed) == weights(whole)


def test_u17_the_same_command_twice_gives_the_same_bytes_and_another_seed_does_not(run_classify: RunClassify) -> None:
    first, second = run_classify("distilbert", "first"), run_classify("distilbert", "second")
    assert weights(first) == weights(second)
    assert weights(first) != weights(run_classify("distilbert", "other", "--seed", "7"))


def test_a_merged_classifier_is_reloaded_and_predicts_the_same(run_classify: RunClassify) -> None:
    output = run_classify("bert", "run", "--lora_head", "true", "--merge")
    assert results(output)["merge_max_abs_diff"] < 1e-4
    texts = [row["text"] for row in TEXTS[:20]]
    adapter = classify(load_trained_classifier(output, BACKENDS["reference"]), texts)
    merged = classify(load_trained_classifier(output / "merged", BACKENDS["reference"]), texts)
    torch.testing.assert_close(torch.tensor(merged), torch.tensor(adapter), rtol=1e-4, atol=1e-6)


def test_load_best_model_at_end_saves_the_best_checkpoint(run_classify: RunClassify) -> None:
    for method in METHODS:
        flags = ["--load_best_model_at_end", "true", "--metric_for_best_model", "accuracy", "--learning_rate", "0.5"]
        output = run_classify(
            "distilbert", method, "--method", method, *flags, "--save_steps", "1", "--eval_steps", "1"
        )
        state = json.loads((output / "trainer_state.json").read_text())
        assert weights(output) == weights(Path(state["best_model_checkpoint"]))
        assert results(output)["validation_accuracy"] == pytest.approx(state["best_metric"])


def test_a_quantised_base_carries_a_classifiers_adapter(run_classify: RunClassify) -> None:
    output = run_classify("distilbert", "run", "--load_in_4bit", "true", "--train_head", "true")
    assert json.loads((output / "run.json").read_text())["quantization_config"]["load_in_4bit"] is True
    assert len(losses(output)) == 6


def launch(processes: int, batch: int, output: Path, model: Path, texts: Path, *flags: str) -> dict[str, object]:
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", "accelerate_configs/cpu.yaml", "--num_processes", str(processes)),
        *("--main_process_port", "0", "recipes/classify.py", "--config", "recipes/distilbert-imdb/lora.yaml"),
        *("--model_name_or_path", str(model), "--dataset_name", str(texts), "--labels", "ham", "spam"),
        *("--output_dir", str(output), "--test_split_size", "20", "--max_steps", "20", "--logging_steps", "1"),
        *("--eval_strategy", "no", "--save_strategy", "no", "--validation_split_size", "20", "--report_to", "none"),
        *("--per_device_train_batch_size", str(batch), "--learning_rate", "5e-3", *flags),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("model card, confusion.png") == 1, "every process printed the summary"
    return results(output)


@pytest.mark.parametrize(
    ("kind", "method", "backend"),
    [
        ("distilbert", "lora", "fused"),
        ("gpt2", "lora", "peft"),
        ("distilbert", "last_layers", "reference"),
        ("gpt2", "full", "reference"),
    ],
)
def test_two_processes_train_what_one_process_trains_with_twice_the_batch(
    tmp_path: Path, backbone_dirs: dict[str, Path], texts_file: Path, kind: str, method: str, backend: str
) -> None:
    # Without length grouping, whose batches are those of one process; 20 steps are two epochs of 80 rows.
    flags = ["--method", method, "--lora_backend", backend, "--train_sampling_strategy", "random"]
    flags += ["--lora_key", "true", "--lora_head", "true", "--precision", "fp32"]
    model = tmp_path / "no-dropout"
    shutil.copytree(backbone_dirs[kind], model)
    config = json.loads((model / "config.json").read_text())
    config |= {name: 0.0 for name in config if "drop" in name}
    (model / "config.json").write_text(json.dumps(config))
    one = launch(1, 8, tmp_path / "one", model, texts_file, *flags)
    two = launch(2, 4, tmp_path / "two", model, texts_file, *flags)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3, abs=1e-4)
    assert two["test_rows"] == 20
    assert two["test_confusion"] == one["test_confusion"]
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-3, abs=1e-4)


def test_batches_hold_texts_of_similar_lengths_and_are_padded_to_their_longest(
    run_classify: RunClassify, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [f"{'win a' if number % 2 else 'see'} {'very ' * (number * 7 % 40)}soon" for number in range(400)]
    file = tmp_path / "lengths.csv"
    file.write_text("text,label\n" + "".join(f"{text},{at % 2}\n" for at, text in enumerate(rows)))
    batches: list[tuple[int, int]] = []
    original = DataCollatorWithPadding.__call__

    def watch(self: DataCollatorWithPadding, rows: list[dict[str, list[int]]]) -> object:
        batch = original(self, rows)
        assert batch["input_ids"].shape[1] == max(len(row["input_ids"]) for row in rows)
        batches.append((batch["attention_mask"].numel(), int(batch["attention_mask"].sum())))
        return batch

    def padding(*flags: str) -> float:
        batches.clear()
        none = ["--eval_strategy", "no", "--save_strategy", "no", "--overwrite", "--max_steps", "40"]
        run_classify("distilbert", "run", "--dataset_name", str(file), *none, *flags)
        train = batches[:40]
        return 1 - sum(real for _, real in train) / sum(places for places, _ in train)

    monkeypatch.setattr(DataCollatorWithPadding, "__call__", watch)
    assert padding() < 0.4 * padding("--train_sampling_strategy", "random")


def test_a_loss_of_accumulated_batches_is_that_of_one_big_batch(run_classify: RunClassify) -> None:
    # transformers#47688: a head that ignores num_items_in_batch would train on twice the loss.
    flags = ["--train_sampling_strategy", "random", "--method", "last_layers", "--max_steps", "1"]
    whole = run_classify("bert", "whole", *flags, "--save_steps", "1")
    parts = run_classify(
        *("bert", "parts", *flags, "--save_steps", "1"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"),
    )
    assert losses(parts) == pytest.approx(losses(whole), rel=0.2)  # the backbone's dropout differs


@pytest.mark.parametrize(
    "head", [[], ["--lora_head", "true"], ["--train_head", "true"]], ids=["frozen", "lora", "whole"]
)
def test_a_classifiers_recipe_and_its_adapter_are_compared(
    tmp_path: Path,
    backbone_dirs: dict[str, Path],
    texts_file: Path,
    capfd: pytest.CaptureFixture[str],
    run_classify: RunClassify,
    head: list[str],
) -> None:
    data = ["--model_name_or_path", str(backbone_dirs["distilbert"]), "--dataset_name", str(texts_file)]
    flags = [*data, "--labels", "ham", "spam", "--test_split_size", "20", "--lora_dropout", "0.1", *head]
    flags += ["--lora_backend", "reference"]
    start = ["compare", "--config", "recipes/distilbert-imdb/lora.yaml", "--steps", "4"]
    main([*start, "--output", str(tmp_path / "out"), "--", *flags])
    assert re.search(r"7 levels hold, [67] of them to the last bit; 0 fail; 1 did not run", capfd.readouterr().out)
    (compared,) = json.loads((tmp_path / "out" / "parity.json").read_text())["cases"]
    rounded = {level["level"] for level in compared["levels"] if level["status"] == "pass" and not level["identical"]}
    assert rounded <= {"merge"}  # which sums W + s B A in one product, and may round otherwise than PEFT's two
    output = run_classify("distilbert", "trained", *head)
    capfd.readouterr()
    main(["compare", "--adapter", str(output), "--output", str(tmp_path / "adapter")])
    assert "0 fail" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        main([*start, "--", *flags, "--method", "full"])
    assert "trains no LoRA, so there is nothing to compare" in capfd.readouterr().err
