"""A language model's own weights: every one, or its last layers. What is trained, saved, resumed and refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from plainlora.commands import main
from plainlora.generation import generate
from plainlora.run.reproduction import compare_runs
from tests.conftest import CONFIGS, ROOT, load_quantized
from tests.recipes.conftest import RunSFT
from tests.recipes.test_sft import losses

PACKED = ["--packing", "true"]


def results(folder: Path) -> dict[str, object]:
    return json.loads((folder / "all_results.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def changed(output: Path, base: Path) -> set[str]:
    after, before = (AutoModelForCausalLM.from_pretrained(folder).named_parameters() for folder in (output, base))
    return {name for (name, now), (_, then) in zip(after, before, strict=True) if not torch.equal(now, then)}


@pytest.mark.parametrize("kind", CONFIGS)
def test_full_trains_every_weight_and_leaves_a_model_that_transformers_loads(
    run_sft: RunSFT, model_dirs: dict[str, Path], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", "full", "--max_steps", "20", "--save_steps", "10", "--sample_prompts", "Say 1."]
    output = run_sft(kind, "run", *flags)
    printed = capfd.readouterr().out
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert changed(output, model_dirs[kind]) == {name for name, _ in model.named_parameters()}
    found = results(output)
    assert found["trainable_params"] == found["total_params"] == sum(each.numel() for each in model.parameters())
    assert found["method"] == "full"
    assert found["eval_loss"] < found["eval_loss_base"]
    for step in (10, 20):
        names = {path.name for path in (output / f"checkpoint-{step}").iterdir()}
        assert {"config.json", "model.safetensors", "optimizer.pt", "trainer_state.json", "manifest.json"} <= names
        assert "adapter_model.safetensors" not in names
    assert weights(output / "checkpoint-20") == weights(output) != weights(output / "checkpoint-10")

    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "transformers"
    assert "lora" not in card.data.tags
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    assert "PeftModel" not in card.text
    assert "This model is `" in card.text
    assert f'next: plainlora generate --model {output} --prompt "..."' in printed
    assert "plainlora merge" not in printed
    run = json.loads((output / "run.json").read_text())
    assert (run["arguments"]["method"], run["weights"]["file"], run["steps"]) == ("full", "model.safetensors", 20)

    main(["generate", "--model", str(output), "--prompt", "Say 1.", "--max_new_tokens", "4"])
    answer = generate(model, AutoTokenizer.from_pretrained(output), [_rendered(output, "Say 1.")], 4)[0]
    assert capfd.readouterr().out == f"\nSay 1.\n\n[model]\n{answer}\n"


def _rendered(folder: Path, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_base_is_measured_as_it_was_before_training(run_sft: RunSFT) -> None:
    lora, full = run_sft("llama", "lora"), run_sft("llama", "full", "--method", "full")
    assert results(full)["eval_loss_base"] == pytest.approx(results(lora)["eval_loss_base"], rel=1e-6)


LAST = {  # of the two blocks of each; Qwen2's head is the input embedding too
    "gpt2": ({"transformer.h.1.", "transformer.ln_f."}, 1),
    "llama": ({"model.layers.1.", "model.norm.", "lm_head."}, 1),
    "qwen2": ({"model.layers.0.", "model.layers.1.", "model.norm."}, 2),
}


@pytest.mark.parametrize("kind", LAST)
def test_last_layers_trains_these_and_leaves_every_other_weight_as_it_was(
    run_sft: RunSFT, model_dirs: dict[str, Path], kind: str
) -> None:
    prefixes, count = LAST[kind]
    flags = [] if count == 1 else ["--last_layers", str(count)]
    output = run_sft(kind, "run", "--method", "last_layers", *flags)
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(output).named_parameters()]
    assert changed(output, model_dirs[kind]) == {name for name in names if name.startswith(tuple(prefixes))}


def test_a_tied_head_is_trained_by_the_name_of_the_embedding_alone(
    run_sft: RunSFT, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", "last_layers", "--last_layers"]
    output = run_sft("qwen2", "both", *flags, "model.norm", "model.embed_tokens")
    assert changed(output, model_dirs["qwen2"]) == {"model.norm.weight", "model.embed_tokens.weight"}
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for asked, said in (
        ("lm_head", "lm_head has the weight of the input embedding (tie_word_embeddings); name model.embed_tokens to"),
        ("3", "last_layers 3: Qwen2ForCausalLM has 2 blocks; give 1 to 2"),
        ("norm", "last_layers: there is no module 'norm'; did you mean model.norm?"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_sft("qwen2", "refused", *flags, asked)
        assert stopped.value.code == 2
        assert said in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("method", ["full", "last_layers"])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(run_sft: RunSFT, method: str) -> None:
    flags = ["--method", method, "--packing", "false"]
    whole = run_sft("gpt2", "whole", *flags)
    shutil.copytree(whole / "checkpoint-3", whole.parent / "resumed" / "checkpoint-3")
    resumed = run_sft("gpt2", "resumed", *flags, "--resume_from_checkpoint", "true")
    assert losses(resumed) == losses(whole)
    assert weights(resumed) == weights(whole)
    assert results(resumed)["eval_loss_base"] == results(whole)["eval_loss_base"]


def test_a_model_in_shards_is_resumed_to_the_same_bytes(
    run_sft: RunSFT, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No flag sets the size from which Transformers divides a file, 50 GB, so the test lowers its default."""
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(save, "__defaults__", tuple("100KB" if each == "50GB" else each for each in save.__defaults__))
    flags = ["--method", "full", "--packing", "false"]
    whole = run_sft("llama", "whole", *flags)
    shards = {path.name: path.read_bytes() for path in whole.glob("model*.safetensors")}
    assert len(shards) > 3
    assert "model.safetensors" not in shards
    resumed = whole.parent / "resumed"
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    missing = min((resumed / "checkpoint-6").glob("model-*"))
    missing.unlink()
    capfd.readouterr()
    run_sft("llama", "resumed", *flags, "--resume_from_checkpoint", "true")
    passed_over = (
        f"checkpoint-6 is passed over: {missing.parent / 'model.safetensors.index.json'} names {missing.name}"
    )
    assert passed_over in capfd.readouterr().out
    assert {path.name: path.read_bytes() for path in resumed.glob("model*.safetensors")} == shards
    assert all(stage.equal for stage in compare_runs(whole, resumed) if "order" not in stage.name)

    monkeypatch.undo()
    run_sft("llama", "whole", *flags, "--overwrite", "true")
    assert [path.name for path in whole.glob("model*")] == ["model.safetensors"]


def test_a_killed_run_is_resumed_to_the_same_bytes(
    run_sft: RunSFT, model_dirs: dict[str, Path], rows_file: Path
) -> None:
    flags = ["--method", "full", "--max_steps", "400", "--save_steps", "20", "--eval_strategy", "no"]
    whole = run_sft("llama", "whole", *flags, "--save_total_limit", "1")
    output = whole.parent / "killed"
    command = [word.replace(str(whole), str(output)) for word in sys.argv]
    child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, env=dict(os.environ))
    limit = time.monotonic() + 200
    while not list(output.glob("checkpoint-*")) and time.monotonic() < limit:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (output / "model.safetensors").exists(), "the run was over before it was killed"
    resumed = run_sft("llama", "killed", *flags, "--save_total_limit", "1", "--resume_from_checkpoint", "true")
    assert weights(resumed) == weights(whole)


def test_a_checkpoint_of_another_method_is_not_resumed(run_sft: RunSFT, capfd: pytest.CaptureFixture[str]) -> None:
    full = run_sft("gpt2", "run", "--method", "full")
    for method, said in (
        ("lora", "checkpoint-6 holds a whole model, which method lora cannot resume"),
        ("last_layers", "was trained with method full, now it is last_layers"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_sft("gpt2", "run", "--method", method, "--resume_from_checkpoint", str(full / "checkpoint-6"))
        assert stopped.value.code == 2
        assert said in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "form", [["--gradient_checkpointing", "true"], [*PACKED, "--gradient_accumulation_steps", "2"]]
)
@pytest.mark.parametrize("method", ["full", "last_layers"])
def test_gradients_reach_what_is_trained_in_every_form_of_the_run(
    run_sft: RunSFT, model_dirs: dict[str, Path], method: str, form: list[str]
) -> None:
    output = run_sft("llama", "run", "--method", method, *form)
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(output).named_parameters()}
    last = {name for name in names if name.startswith(("model.layers.1.", "model.norm.", "lm_head."))}
    assert changed(output, model_dirs["llama"]) == (names if method == "full" else last)


def test_weights_are_trained_in_float32_under_mixed_precision(
    run_sft: RunSFT, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(model_dirs["llama"]).save_pretrained(half)
    flags = ["--model_name_or_path", str(half), "--method", "full", "--precision", "bf16"]
    output = run_sft("llama", "run", *flags)
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.float32}
    asked = run_sft("llama", "asked", *flags, "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(asked / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--merge"], "merge: method full leaves a whole model, so there is nothing to merge"),
        (
            ["--load_in_4bit"],
            "method full trains the base's own weights, which is not possible in 4 or 8 bits; use lora",
        ),
        (["--last_layers", "1"], "last_layers belongs to --method last_layers, not full"),
    ],
)
def test_what_does_not_go_with_the_method_is_refused_before_anything_is_read(
    run_sft: RunSFT, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_sft("llama", "run", "--method", "full", *flags)
    assert stopped.value.code == 2
    assert said in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_quantised_checkpoint_is_refused(
    run_sft: RunSFT, model_dirs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    load_quantized(base, load_in_4bit=True).save_pretrained(base)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_sft("llama", "run", "--method", "full", "--model_name_or_path", str(base))
    assert stopped.value.code == 2
    said = f"method full trains the base's own weights, and {base} is stored in 4 or 8 bits; give the base in 16 or 32"
    assert said in capfd.readouterr().err


def test_commands_for_adapters_refuse_a_whole_model_in_one_line(
    run_sft: RunSFT, capfd: pytest.CaptureFixture[str]
) -> None:
    output = str(run_sft("llama", "run", "--method", "full", "--max_steps", "1", "--save_strategy", "no"))
    prompt = ["--prompt", "Say 1."]
    for command, said in (
        (["generate", "--adapter", output, *prompt], f"{output} is a whole model, not an adapter; give it as --model"),
        (["generate", "--model", output, "--with_peft", *prompt], "--with_peft is for an adapter, and --model"),
        (["merge", "--adapter", output, "--output", f"{output}-merged"], "adapter"),
        (
            ["compare", "--config", "recipes/quickstart/lora.yaml", "--", "--method", "full", "--merge", "false"],
            "no LoRA",
        ),
    ):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert said in lines[0], lines


def launch(processes: int, output: Path, model: Path, rows: Path, *flags: str) -> None:
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", "accelerate_configs/cpu.yaml", "--num_processes", str(processes)),
        *(
            "--main_process_port",
            "0",
            "recipes/sft.py",
            "--config",
            "recipes/quickstart/lora.yaml",
            "--merge",
            "false",
        ),
        *("--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir", str(output)),
        *("--test_split_size", "7", "--max_length", "256", "--max_steps", "20", "--learning_rate", "2e-2"),
        *("--per_device_train_batch_size", str(4 // processes), "--logging_steps", "1", "--exact_match_rows", "0"),
        *("--eval_steps", "3", "--save_strategy", "steps", "--save_steps", "3", "--early_stopping_patience", "2"),
        *("--metric_for_best_model", "mean_token_accuracy", "--greater_is_better", "false", "--max_new_tokens", "4"),
        *("--save_total_limit", "9", "--sample_prompts", "Say 1.", "Say 2.", "Say 3.", "--sample_steps", "3", *flags),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_train_sample_and_stop_as_one_does(
    tmp_path: Path, model_dirs: dict[str, Path], rows_file: Path, method: str
) -> None:
    outputs = [tmp_path / name for name in ("one", "two")]
    for processes, output in enumerate(outputs, 1):
        launch(processes, output, model_dirs["llama"], rows_file, "--method", method)
    one, two = (json.loads((output / "trainer_state.json").read_text()) for output in outputs)
    assert two["global_step"] == one["global_step"] == one["best_global_step"] + 6 < 20
    assert losses(outputs[1]) == pytest.approx(losses(outputs[0]), rel=1e-3)
    # Every process has the best weights at the end, not the last ones.
    (best,) = [e["eval_loss"] for e in two["log_history"] if e["step"] == two["best_global_step"] and "eval_loss" in e]
    found = results(outputs[1])
    assert found.get("eval_loss_adapter", found.get("eval_loss")) == pytest.approx(best, rel=1e-6)
    assert best != pytest.approx(two["log_history"][-1].get("eval_loss", 0.0), rel=1e-3)
    assert (outputs[1] / "samples.md").read_text().count("\nstep 3\n") == 3
