"""What PEFT alone implements, DoRA, and adapters that are trained on: whole runs, resumed, merged and asked."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plainlora import load_adapter
from plainlora.backends import choose_loader
from plainlora.commands import main
from tests.conftest import make_model, random_ids
from tests.hub_server import HubUser, serve_hub
from tests.recipes.conftest import RunClassify, RunSFT
from tests.refusals import without_progress

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
WEIGHTS = "adapter_model.safetensors"
FIELDS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": {}},
    "corda": {"init_lora_weights": "corda"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "dora": {"use_dora": True},
    "kasa": {"kasa_config": {}},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=random_ids()).logits


@pytest.mark.parametrize("name", FIELDS)
def test_a_run_is_resumed_merged_and_asked(name: str, run_sft: RunSFT, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--lora_config", json.dumps(FIELDS[name]), "--lora_target_modules", "q_proj", "down_proj")
    whole = run_sft("llama", "whole", *flags, "--merge", "true", "--save_steps", "2", "--save_total_limit", "9")
    said = capfd.readouterr().out
    assert ("PEFT's own code trains this adapter: " in said) == (name != "dora")
    config = json.loads((whole / "adapter_config.json").read_text())
    converted = name in ("pissa", "lora_ga", "corda")
    assert config["r"] == (4 if converted else 2)
    assert config["init_lora_weights"] == (name if name in ("eva", "mica") else True)

    backend = "fused" if name == "dora" else "peft_fused"
    assert json.loads((whole / "run.json").read_text())["lora_backend"] == backend
    assert f"| LoRA back end | {backend} |" in (whole / "README.md").read_text()
    checkpoint = str(whole / "checkpoint-2")
    resumed = run_sft("llama", "resumed", *flags, "--save_steps", "2", "--resume_from_checkpoint", checkpoint)
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()

    adapted = logits(choose_loader(whole, make_model("llama")).load(make_model("llama"), whole))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make_model("llama"), whole)), adapted)
    merged = AutoModelForCausalLM.from_pretrained(whole / "merged")
    torch.testing.assert_close(logits(merged), adapted, rtol=0, atol=1e-4 * float(adapted.abs().max()))
    if converted:  # any program adds it to the base as its checkpoint holds it
        torch.testing.assert_close(logits(load_adapter(make_model("llama"), whole)), adapted)
    results = json.loads((whole / "all_results.json").read_text())
    if name != "kasa":  # which starts from a truncated base
        own = run_sft("llama", "plain", "--lora_target_modules", "q_proj", "down_proj")
        plain = json.loads((own / "all_results.json").read_text())
        assert results["eval_loss_base"] == pytest.approx(plain["eval_loss_base"], rel=1e-5)
    capfd.readouterr()
    main(["generate", "--adapter", str(whole), "--prompt", "Say", "--max_new_tokens", "3"])
    assert "[tuned]" in capfd.readouterr().out


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_what_plain_peft_saved_unconverted_is_asked_and_merged(
    init: str, model_dirs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As every checkpoint of these: PEFT computes their start, and the base that it changes, again on loading."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=init)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), lora)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    trained, adapter = logits(model), tmp_path / "adapter"
    model.save_pretrained(str(adapter))
    assert json.loads((adapter / "adapter_config.json").read_text())["init_lora_weights"] == init
    base = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    assert not torch.allclose(logits(base), trained, atol=1e-2)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, adapter)), trained)

    ask = ["--adapter", str(adapter), "--prompt", "Say the number after 3.", "--max_new_tokens", "8"]
    main(["generate", *ask, "--with_peft"])
    _, tuned, by_peft = re.findall(r"^\[.*\]\n(.*(?:\n.+)*)", capfd.readouterr().out, re.MULTILINE)
    assert tuned == by_peft
    main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-4 * float(trained.abs().max()))


def test_dora_in_8_bits_is_resumed_merged_and_asked(run_sft: RunSFT, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--use_dora", "true", "--load_in_8bit", "true", "--lora_target_modules", "q_proj", "down_proj")
    whole = run_sft("llama", "whole", *flags, "--merge", "true", "--save_steps", "2", "--save_total_limit", "9")
    resumed = run_sft("llama", "resumed", *flags, "--resume_from_checkpoint", str(whole / "checkpoint-2"))
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    main(["generate", "--adapter", str(whole), "--prompt", "Say", "--max_new_tokens", "3", "--base", "dequantized"])
    assert "[tuned]" in capfd.readouterr().out


def refusal(run: Callable[..., object], *arguments: str, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of a program that stops."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 2
    (line,) = without_progress(capfd.readouterr().err)
    return line


@pytest.mark.parametrize(
    ("bits", "config", "said"),
    [
        (8, {"use_dora": True}, "use_dora: on a CPU in 8 bits PEFT loses the scales"),
        (4, {"init_lora_weights": "olora"}, "'olora': PEFT rounds the base that it changes to 4 bits again"),
        (
            8,
            {"init_lora_weights": "mica"},
            "'mica': PEFT starts this adapter from the base's weights in 16 or 32 bits",
        ),
        (4, {"kasa_config": {}}, "kasa_config: PEFT ignores it on a base in 4 bits"),
        (8, {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: in 8 bits the copies of a layer"),
    ],
)
def test_what_a_base_in_4_or_8_bits_does_not_take_is_refused_by_the_programs_and_the_doctor(
    bits: int,
    config: dict[str, Any],
    said: str,
    run_sft: RunSFT,
    run_classify: RunClassify,
    model_dirs: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = ("--lora_config", json.dumps(config), f"--load_in_{bits}bit", "true", "--lora_backend", "peft")
    assert said in refusal(run_sft, "llama", "refused", *flags, "--lora_target_modules", "q_proj", capfd=capfd)
    assert said in refusal(run_classify, "distilbert", "refused", *flags, capfd=capfd)
    assert not (tmp_path / "refused").exists()
    paths = ("--model_name_or_path", str(model_dirs["llama"]), "--dataset_name", str(rows_file), "--use_cpu", "true")
    with pytest.raises(SystemExit):
        main(["doctor", "--config", "recipes/gpt2-alpaca-gpt4/lora.yaml", "--", *paths, *flags])
    assert said in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("qwen2", ("--lora_target_modules", "embed_tokens", "q_proj"), "embed_tokens shares its weight with"),
        (
            "llama",
            ("--lora_config", '{"layer_replication": [[0, 2], [1, 2]]}', "--lora_target_modules", "q_proj"),
            "copies of a layer share its weights",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_before_training(
    kind: str, flags: tuple[str, ...], said: str, run_sft: RunSFT, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refusal(run_sft, kind, "refused", *flags, "--merge", "true", capfd=capfd)
    assert said in line
    assert line.endswith("; set merge to false")
    assert not (tmp_path / "refused").exists()


def test_an_adapter_is_trained_on_and_resumed(run_sft: RunSFT, capfd: pytest.CaptureFixture[str]) -> None:
    first = run_sft("llama", "first", "--max_steps", "6")
    flags = ("--adapter_name_or_path", str(first), "--max_steps", "6")
    second = run_sft("llama", "second", *flags, "--lora_r", "8", "--save_steps", "3")
    assert f"goes on from the adapter {first}; it keeps its own r 2 (the recipe: 8)" in capfd.readouterr().out
    record = json.loads((second / "run.json").read_text())
    assert record["parent"]["name"] == str(first)
    assert record["parent"]["sha256"] == json.loads((first / "run.json").read_text())["weights"]["sha256"]
    assert json.loads((second / "adapter_config.json").read_text())["r"] == 2
    before = load_file(first / WEIGHTS)
    after = load_file(second / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    losses = [
        json.loads((run / "trainer_state.json").read_text())["log_history"][0]["loss"] for run in (first, second)
    ]
    assert losses[1] < losses[0]
    assert "It goes on from an earlier adapter." in (second / "README.md").read_text()

    again = run_sft("llama", "again", *flags, "--resume_from_checkpoint", str(second / "checkpoint-3"))
    assert (again / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


def test_an_adapter_of_the_hub_is_trained_on(
    model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path, run_sft: RunSFT
) -> None:
    first = run_sft("llama", "first")
    with serve_hub() as (address, hub):
        hub.make_repo("ann/first")
        files = {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()}
        commit = hub.commit("ann/first", "main", files, "an adapter")
        user = HubUser(address, tmp_path / "home")
        flags = {
            "model_name_or_path": model_dirs["llama"], "dataset_name": rows_file, "output_dir": tmp_path / "second",
            "prompt_template": "alpaca", "adapter_name_or_path": "ann/first", "max_steps": 1, "report_to": "none",
            "max_length": 256, "use_cpu": "true", "precision": "fp32", "save_strategy": "no",
        }  # fmt: skip
        done = user.run("recipes/sft.py", *(f"--{name}={value}" for name, value in flags.items()))
        gone = user.run("recipes/sft.py", *(f"--{name}={value}" for name, value in (flags | {
            "adapter_name_or_path": "ann/gone", "output_dir": tmp_path / "third",
        }).items()))  # fmt: skip
        user.close()
    assert done.code == 0, done.err
    assert "goes on from the adapter ann/first" in done.out
    assert json.loads((tmp_path / "second" / "run.json").read_text())["parent"] == {
        "name": "ann/first",
        "commit": commit,
        "sha256": json.loads((first / "run.json").read_text())["weights"]["sha256"],
    }
    fetched = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert fetched == {"adapter_config.json", WEIGHTS, "run.json"}
    assert "error: adapter_name_or_path: ann/gone is neither a folder here nor an adapter that" in gone.err
    assert not (tmp_path / "third").exists()


def test_another_base_or_task_is_one_line(
    run_sft: RunSFT, run_classify: RunClassify, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter, texts = run_sft("llama", "adapter"), run_classify("distilbert", "texts")

    def refused(run: Any, kind: str, *flags: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as raised:
            run(kind, "refused", *flags)
        (line,) = without_progress(capfd.readouterr().err)
        assert raised.value.code == 2
        assert not (tmp_path / "refused").exists()
        return line

    assert "was trained on" in refused(run_sft, "qwen2", "--adapter_name_or_path", str(adapter))
    assert "is a classifier's; train it with recipes/classify.py" in refused(
        run_sft, "llama", "--adapter_name_or_path", str(texts)
    )
    assert "is a language model's; train it with recipes/sft.py" in refused(
        run_classify, "distilbert", "--adapter_name_or_path", str(adapter)
    )


def test_a_classifiers_adapter_is_trained_on(run_classify: RunClassify) -> None:
    first = run_classify("distilbert", "first")
    second = run_classify("distilbert", "second", "--adapter_name_or_path", str(first))
    before, after = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((second / "run.json").read_text())["parent"]["name"] == str(first)


EVA = ("--lora_config", '{"init_lora_weights": "eva"}', "--lora_target_modules")


def test_eva_passes_over_batches_with_too_few_tokens_and_is_refused_without_any_other(
    run_sft: RunSFT, capfd: pytest.CaptureFixture[str]
) -> None:
    """PEFT's own loop would print a line for each layer and batch, and never end without a batch that is enough."""
    few = (*EVA, "q_proj", "--completion_only_loss", "true", "--packing", "false", "--lora_r")
    line = refusal(partial(run_sft, "llama", "run"), *few, "16", capfd=capfd)
    found = re.search(
        r"'eva' computes 32 components \(r times rho\), and no batch of training rows has more than (\d+) trained "
        r"tokens; raise per_device_train_batch_size, or lower r$",
        line,
    )
    assert found, line
    run_sft("llama", "run", *few, str(int(found[1]) // 2))
    assert "skipping SVD" not in capfd.readouterr().out


def test_a_classifier_starts_from_rows(run_classify: RunClassify) -> None:
    own = ("--lora_query", "false", "--lora_value", "false", "--lora_mlp", "false")
    output = run_classify("distilbert", "run", *EVA, "q_lin", "--lora_r", "2", *own)
    assert json.loads((output / "adapter_config.json").read_text())["init_lora_weights"] == "eva"
