"""The recipe as a program: the two back ends beside each other, resuming, quantised bases, what it leaves behind."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from plainlora.backends import BACKENDS
from plainlora.data.prompts import render_prompt
from plainlora.folders import find_damage, write_manifest
from plainlora.merging import merge
from plainlora.run.checkpoints import find_problem
from tests.conftest import CONFIGS, ROOT, ROWS, load_quantized, random_ids
from tests.recipes.conftest import RunSFT


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_hand_written_lora_trains_the_very_adapter_that_peft_trains(run_sft: RunSFT, kind: str) -> None:
    ours = run_sft(kind, "ours", "--lora_backend", "reference")
    theirs = run_sft(kind, "theirs", "--lora_backend", "peft")
    assert find_damage(ours) is None
    assert find_damage(theirs) is None
    assert len(losses(ours)) == 6
    assert losses(ours) == losses(theirs)
    assert adapter_bytes(ours) == adapter_bytes(theirs)


def test_u17_the_same_command_twice_gives_the_same_bytes_and_another_seed_does_not(run_sft: RunSFT) -> None:
    first, second = run_sft("llama", "first"), run_sft("llama", "second")
    assert adapter_bytes(first) == adapter_bytes(second)
    assert adapter_bytes(first) != adapter_bytes(run_sft("llama", "other", "--seed", "7"))


@pytest.mark.parametrize("backend", ["reference", "peft"])
def test_u09_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(run_sft: RunSFT, backend: str) -> None:
    whole = run_sft("gpt2", "whole", "--lora_backend", backend)
    for name, asked in (("newest", "true"), ("path", str(whole.parent / "path" / "checkpoint-3"))):
        shutil.copytree(whole / "checkpoint-3", whole.parent / name / "checkpoint-3")
        resumed = run_sft("gpt2", name, "--lora_backend", backend, "--resume_from_checkpoint", asked)
        assert adapter_bytes(resumed) == adapter_bytes(whole)
        assert losses(resumed) == losses(whole)


def test_u09_the_second_epoch_of_rows_grouped_by_length_is_the_same_when_resumed(run_sft: RunSFT) -> None:
    # 32 rows in batches of 2: step 20 lies in the second epoch.
    flags = ["--train_sampling_strategy", "group_by_length", "--packing", "false"]
    flags += ["--max_steps", "24", "--save_steps", "20", "--eval_strategy", "no"]
    whole = run_sft("gpt2", "whole", *flags)
    shutil.copytree(whole / "checkpoint-20", whole.parent / "resumed" / "checkpoint-20")
    resumed = run_sft("gpt2", "resumed", *flags, "--resume_from_checkpoint", "true")
    assert losses(resumed) == losses(whole)
    assert adapter_bytes(resumed) == adapter_bytes(whole)


def test_u10_resuming_passes_over_a_broken_newest_checkpoint_and_says_so(
    run_sft: RunSFT, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = run_sft("gpt2", "whole")

    def resume(name: str, broken: str, damaged: Callable[[bytes], bytes]) -> str:
        for step in (3, 6):
            shutil.copytree(whole / f"checkpoint-{step}", whole.parent / name / f"checkpoint-{step}")
        path = whole.parent / name / "checkpoint-6" / broken
        path.write_bytes(damaged(path.read_bytes()))
        capfd.readouterr()
        resumed = run_sft("gpt2", name, "--resume_from_checkpoint", "true")
        assert adapter_bytes(resumed) == adapter_bytes(whole)
        assert find_problem(resumed / "checkpoint-6") is None
        passed = [line for line in capfd.readouterr().out.splitlines() if "passed over" in line]
        assert len(passed) == 1
        return passed[0]

    def with_one_bit_flipped(content: bytes) -> bytes:
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]

    cut = resume("cut", "adapter_model.safetensors", lambda content: content[:100])
    assert "/checkpoint-6 is passed over: a file is damaged: " in cut
    flipped = resume("flipped", "optimizer.pt", with_one_bit_flipped)
    assert flipped.endswith(
        "checkpoint-6 is passed over: the content of optimizer.pt has changed since it was written"
    )


class Malice:
    """What an attacker puts into a pickle: loading it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.marker,)


def test_u23_a_checkpoints_pickles_are_never_run(
    run_sft: RunSFT, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, marker = run_sft("gpt2", "whole"), tmp_path / "marker"
    torch.save(Malice(marker), tmp_path / "malice.pt")
    torch.load(tmp_path / "malice.pt", weights_only=False)
    assert marker.exists()  # so this is what would happen
    marker.unlink()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        checkpoint = shutil.copytree(whole / "checkpoint-3", tmp_path / name / "checkpoint-3")
        shutil.copy(tmp_path / "malice.pt", checkpoint / name)
        write_manifest(checkpoint)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_sft("gpt2", name, "--resume_from_checkpoint", str(checkpoint))
        assert stopped.value.code == 2
        message = capfd.readouterr().err.strip().splitlines()[-1]
        assert message.startswith(
            f"error: resume_from_checkpoint: {checkpoint} is not whole: {name} is cut short, or holds more than "
            "numbers and text, which could run code; give another checkpoint"
        )
        assert not marker.exists()
    checkpoint = shutil.copytree(whole / "checkpoint-3", tmp_path / "arguments" / "checkpoint-3")
    shutil.copy(tmp_path / "malice.pt", checkpoint / "training_args.bin")
    resumed = run_sft("gpt2", "arguments", "--resume_from_checkpoint", "true")
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert not marker.exists()


def test_resuming_with_other_settings_is_refused_naming_them(
    run_sft: RunSFT, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ["--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4", "--lora_alpha", "8"]
    first = run_sft("llama", "first", *settings)
    inside = str(first / "checkpoint-3")

    def refusal(name: str, *flags: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_sft("llama", name, *settings, "--resume_from_checkpoint", *flags)
        assert stopped.value.code == 2
        return capfd.readouterr().err.strip().splitlines()[-1]

    for backend in ("reference", "peft"):
        for flags, said in (
            (["--lora_alpha", "100"], "trained with lora_alpha 8, now it is 100"),
            (["--lora_r", "2"], "trained with r 4, now it is 2"),
            (["--lora_modules_to_save", "lm_head"], "trained with modules_to_save [], now it is ['lm_head']"),
            (
                ["--lora_target_modules", "q_proj", "k_proj"],
                "target_modules ['q_proj', 'v_proj'], now it is ['k_proj'",
            ),
        ):
            assert said in refusal("first", inside, "--lora_backend", backend, *flags)
    # A checkpoint of elsewhere is no leave to write over what is here.
    other = run_sft("llama", "other")
    before = adapter_bytes(other)
    assert "holds another run" in refusal("other", inside)
    assert adapter_bytes(other) == before
    (first / "checkpoint-3" / "optimizer.pt").write_bytes(b"x")
    assert "checkpoint-3 is not whole" in refusal("first", inside)


def test_every_checkpoint_holds_the_adapter_alone(run_sft: RunSFT) -> None:
    output = run_sft("gpt2", "run")
    for step in (3, 6):
        names = {path.name for path in (output / f"checkpoint-{step}").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
        assert not {"model.safetensors", "config.json", "pytorch_model.bin"} & names
    assert adapter_bytes(output / "checkpoint-6") == adapter_bytes(output)
    assert adapter_bytes(output / "checkpoint-3") != adapter_bytes(output)


def test_load_best_model_at_end_saves_the_best_checkpoint(run_sft: RunSFT) -> None:
    # The worst is taken for the best, so that it is not the last.
    flags = ["--metric_for_best_model", "mean_token_accuracy", "--greater_is_better", "false"]
    flags += ["--load_best_model_at_end", "true", "--learning_rate", "0.05", "--save_total_limit", "9"]
    output = run_sft("llama", "best", *flags, "--save_steps", "3", "--eval_steps", "3")
    state = json.loads((output / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.name != "checkpoint-6"
    assert adapter_bytes(output) == adapter_bytes(best)
    results = json.loads((output / "all_results.json").read_text())
    (loss,) = [
        entry["eval_loss"]
        for entry in state["log_history"]
        if entry["step"] == state["best_global_step"] and "eval_loss" in entry
    ]
    assert results["eval_loss_adapter"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_changes_nothing_but_memory(run_sft: RunSFT, backend: str) -> None:
    flags = ["--lora_backend", backend, "--gradient_checkpointing"]
    plain = run_sft("gpt2", "plain", *flags, "false")
    checkpointed = run_sft("gpt2", "checkpointed", *flags, "true")
    assert losses(plain) == losses(checkpointed)
    assert adapter_bytes(plain) == adapter_bytes(checkpointed)


def checkpointing(folder: Path) -> list[bool]:
    settings = json.loads((folder / "run.json").read_text())["arguments"]
    return [settings["gradient_checkpointing"], settings["activation_checkpointing"]]


def test_gradient_checkpointing_is_decided_by_what_fits_and_what_is_said_stays(
    run_sft: RunSFT, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = run_sft("llama", "fits", "--max_steps", "2")
    assert re.search(
        r"(?m)^activations: 0\.\d GB for 2 x 256 tokens, [\d.]+ GB free: no gradient checkpointing$",
        capfd.readouterr().out,
    )
    assert checkpointing(fits) == [False, False]
    for said, expected in (("true", True), ("false", False)):
        asked = run_sft("llama", said, "--max_steps", "2", "--gradient_checkpointing", said)
        assert "activations" not in capfd.readouterr().out
        assert checkpointing(asked) == [expected, expected]
    monkeypatch.setattr("plainlora.resources.peak.MARGIN", 1e9)
    scarce = run_sft("llama", "scarce", "--max_steps", "2")
    assert re.search(r"(?m) GB free: gradient checkpointing$", capfd.readouterr().out)
    assert checkpointing(scarce) == [True, True]
    assert adapter_bytes(scarce) == adapter_bytes(fits)


def test_a_base_without_dropout_is_what_training_sees_and_nothing_that_is_saved(
    run_sft: RunSFT, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((model_dirs["gpt2"] / "config.json").read_text())
    dropouts = {name: value for name, value in config.items() if "drop" in name}
    assert set(dropouts.values()) == {0.1}
    without = shutil.copytree(model_dirs["gpt2"], tmp_path / "without")
    (without / "config.json").write_text(json.dumps(config | dict.fromkeys(dropouts, 0.0)))

    recipe = (ROOT / "recipes/gpt2-alpaca-gpt4/lora.yaml").read_text()
    unset = tmp_path / "unset.yaml"
    unset.write_text(re.sub(r"(?m)^base_dropout.*\n(  +#.*\n)*", "", recipe))
    set_ = run_sft("gpt2", "set", "--merge")
    never_there = run_sft("gpt2", "never", "--model_name_or_path", str(without), config=str(unset))
    left = run_sft("gpt2", "left", config=str(unset))
    assert adapter_bytes(set_) == adapter_bytes(never_there)
    assert losses(set_) != losses(left)
    assert json.loads((set_ / "run.json").read_text())["arguments"]["base_dropout"] == 0.0
    merged = json.loads((set_ / "merged" / "config.json").read_text())
    assert {name: merged[name] for name in dropouts} == dropouts


QUANTIZED = {
    "nf4": ["--load_in_4bit", "true"],
    "nf4-nested": ["--load_in_4bit", "true", "--use_bnb_nested_quant", "true"],
    "fp4": ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "fp4"],
    "int8": ["--load_in_8bit", "true"],
}


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_u16_u21_a_quantised_base_trains_fp32_adapters_as_peft_does(run_sft: RunSFT, scheme: str) -> None:
    """Without the seam SFTTrainer would round A to bf16, so equality with an untouched A also shows the seam."""
    ours = run_sft("llama", "ours", *QUANTIZED[scheme], "--lora_backend", "reference")
    theirs = run_sft("llama", "theirs", *QUANTIZED[scheme], "--lora_backend", "peft")
    mine, other = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-7)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)


def test_adapters_are_bf16_if_asked(run_sft: RunSFT) -> None:
    output = run_sft("llama", "run", "--load_in_4bit", "true", "--adapter_dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(output / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_the_llama_recipe_runs_as_it_is_on_its_own_format(
    run_sft: RunSFT, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only the paths, the length of the run and what a CPU lacks are overridden; text rows carry their own format."""
    rows = tmp_path / "guanaco.jsonl"
    texts = [f"<s>[INST] Say {number}. [/INST] {number} it is. </s>" for number in range(24)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = run_sft(
        *("llama", "run", "--dataset_name", str(rows), "--test_split_size", "4", "--optim", "adamw_torch"),
        config="recipes/llama2-7b-guanaco/qlora.yaml",
    )
    printed = capfd.readouterr().out
    assert "why should someone be writing blogs about their field?" in printed
    config = json.loads((output / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert json.loads((output / "run.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_the_instruct_recipe_renders_with_the_models_own_template_and_trains_the_answers_alone(
    run_sft: RunSFT, model_dirs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Own rows on an own model, packed; the oracle is what the template renders with and without the answer."""
    base = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    answers = [{"role": "assistant", "content": f"{number} it is."} for number in range(60)]
    asked = [{"role": "user", "content": f"Say {number}."} for number in range(60)]
    pairs = [{"prompt": [ask], "completion": [answer]} for ask, answer in zip(asked, answers, strict=True)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    output = run_sft(
        *("llama", "run", "--model_name_or_path", str(base), "--dataset_name", str(rows)),
        *("--eval_dataset_name", str(shutil.copy(rows, tmp_path / "test.jsonl"))),
        config="recipes/instruct/lora.yaml",
    )
    printed = capfd.readouterr().out
    whole, prompts = (
        sum(
            len(tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=False))
            for messages in conversations
        )
        for conversations, asks in (
            ([[ask, answer] for ask, answer in zip(asked, answers, strict=True)], False),
            ([[ask] for ask in asked], True),
        )
    )
    assert f"{whole:,} tokens ({whole - prompts:,} trained" in printed
    assert "Explain in two sentences why the sky is blue." in printed
    assert (output / "chat_template.jinja").read_text() == CHATML
    settings = json.loads((output / "run.json").read_text())["arguments"]
    assert (settings["packing"], settings["completion_only_loss"], settings["prompt_template"]) == (True, True, None)
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (16, 32, 7)
    results = json.loads((output / "all_results.json").read_text())
    assert results["eval_loss_adapter"] < results["eval_loss_base"]


def test_the_output_folder_holds_what_the_ecosystem_expects(run_sft: RunSFT, model_dirs: dict[str, Path]) -> None:
    output = run_sft("gpt2", "run", "--exact_match_rows", "3", "--merge", "true", "--hub_token", "hf_secret")
    names = {path.name for path in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"chat_template.jinja", "README.md", "all_results.json", "trainer_state.json", "loss.png"} <= names

    results = json.loads((output / "all_results.json").read_text())
    assert {"eval_loss_base", "eval_loss_adapter", "exact_match_base", "exact_match_adapter"} <= results.keys()
    assert results["eval_loss_adapter"] < results["eval_loss_base"]
    assert results["merge_max_abs_diff"] < 1e-4
    base = AutoModelForCausalLM.from_pretrained(model_dirs["gpt2"])
    tuned = PeftModel.from_pretrained(base, output)
    assert results["trainable_params"] == sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n)

    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a local path is not a Hub id, and the Hub refuses it
    assert f"{results['trainable_params']:,}" in card.text
    picture = (output / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5_000
    assert "hf_secret" not in (output / "run.json").read_text()

    ids = random_ids()
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    torch.testing.assert_close(merged(input_ids=ids).logits, tuned(input_ids=ids).logits)
    assert (output / "merged" / "generation_config.json").exists()
    prompt = "Say it.\n\n### Input:\nmore"
    assert render_prompt(prompt, AutoTokenizer.from_pretrained(output)).endswith("more\n\n### Response:\n")


def test_the_sample_answers_are_saved_whole(
    run_sft: RunSFT, model_dirs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """The oracle is PEFT's model and Transformers' own greedy decoding."""
    prompts = ["Repeat the input.", "Say the number after 3."]
    output = run_sft("llama", "run", "--max_new_tokens", "90", "--sample_prompts", *prompts)
    saved = (output / "samples.md").read_text(encoding="utf-8")
    assert saved in (output / "README.md").read_text(encoding="utf-8")
    printed = capfd.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(output)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), output).eval()
    at, longest = 0, 0
    for prompt in prompts:
        ids = tokenizer(render_prompt(prompt, tokenizer), add_special_tokens=False, return_tensors="pt")
        answers = []
        with tuned.disable_adapter():
            answers.append(tuned.generate(**ids, max_new_tokens=90, do_sample=False))
        answers.append(tuned.generate(**ids, max_new_tokens=90, do_sample=False))
        for answer in answers:
            text = tokenizer.decode(answer[0, ids.input_ids.shape[1] :], skip_special_tokens=True).strip()
            at, longest = saved.index(f"\n{text}\n", at) + 1, max(longest, len(text))
    assert longest > 100  # of which the terminal shows the beginning
    assert "…" in printed


def test_training_on_the_answers_only_trains_fewer_tokens(run_sft: RunSFT, capfd: pytest.CaptureFixture[str]) -> None:
    run_sft("gpt2", "all")
    everything = capfd.readouterr().out
    run_sft("gpt2", "answers", "--completion_only_loss", "true")
    answers = capfd.readouterr().out
    trained = [int(text.split(" trained)")[0].rsplit("(", 1)[1].replace(",", "")) for text in (everything, answers)]
    assert 0 < trained[1] < trained[0] / 2


def test_rows_of_prompt_and_completion_train_the_answers_unless_told_otherwise(
    run_sft: RunSFT, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As TRL reads `completion_only_loss` left out. The recipe sets it, so a copy without it is run."""
    recipe = (ROOT / "recipes/gpt2-alpaca-gpt4/lora.yaml").read_text()
    (tmp_path / "unset.yaml").write_text(re.sub(r"(?m)^completion_only_loss.*\n", "", recipe))
    rows = tmp_path / "rows.jsonl"
    pairs = [{"prompt": row["instruction"], "completion": row["output"]} for row in ROWS]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def trained(name: str, *flags: str) -> tuple[int, int]:
        run_sft("gpt2", name, *flags, "--max_steps", "2", config=str(tmp_path / "unset.yaml"))
        found = re.search(r"train rows: .* ([\d,]+) tokens \(([\d,]+) trained", capfd.readouterr().out)
        assert found
        return int(found[1].replace(",", "")), int(found[2].replace(",", ""))

    tokens, answers = trained("pairs", "--dataset_name", str(rows))
    assert 0 < answers < 0.6 * tokens
    for name, flags in (("told", ["--dataset_name", str(rows), "--completion_only_loss", "false"]), ("others", [])):
        tokens, everything = trained(name, *flags)
        assert 0 < tokens - everything < tokens / 10  # the first token of a row is not predicted


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_room_for_the_merged_model_is_asked_for_before_training(
    run_sft: RunSFT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a disk that has room for all but the merged model, which is dense whatever the base is in training."""
    merged = bytes_of(run_sft("llama", "fits", "--merge") / "merged")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=merged))
    saved = 4 * bytes_of(run_sft("llama", "unmerged"))  # more than adapter and optimizer take
    for name, flags in (("full", []), ("quantized", ["--load_in_4bit"])):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_sft("llama", name, "--merge", *flags)
        assert stopped.value.code == 2
        said = capfd.readouterr().err.strip().splitlines()[-1]
        found = re.fullmatch(
            rf"error: a checkpoint, the result and the merged model in .*{name} needs ([\d.]+) MB, .*; make room, .*",
            said,
        )
        assert found, said
        assert 0.95 * merged < 1e6 * float(found[1]) < merged + saved
        assert not (tmp_path / name).exists()


def test_a_merge_that_cannot_be_written_is_refused_before_training(
    run_sft: RunSFT, model_dirs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(model_dirs["llama"], tmp_path / "base")
    load_quantized(base, load_in_4bit=True).save_pretrained(base)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        run_sft("llama", "run", "--merge", "--load_in_4bit", "--model_name_or_path", str(base))
    printed, said = capfd.readouterr()
    assert "base is stored in 4 or 8 bits; merge into the base in 16 bits" in said
    assert "rows" not in printed
    assert not (tmp_path / "run").exists()


def test_a_merge_that_is_refused_leaves_the_report(
    run_sft: RunSFT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merge.TOLERANCES, torch.float32, 1e-12)
    with pytest.raises(SystemExit) as stopped:
        run_sft("gpt2", "run", "--merge", "true")
    assert stopped.value.code == 2
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "all_results.json", "README.md", "loss.png", "adapter_model.safetensors"} <= names
    assert "merged" not in names


def test_u14_a_single_target_name_stays_a_name(run_sft: RunSFT) -> None:
    for backend in ("reference", "peft"):
        output = run_sft("llama", backend, "--lora_target_modules", "q_proj", "--lora_backend", backend)
        assert all(".q_proj." in name for name in load_file(output / "adapter_model.safetensors"))


def test_a_head_in_modules_to_save_is_trained_and_merged_although_it_was_tied(run_sft: RunSFT) -> None:
    """U8, and SFTTrainer's fused loss, which reads `lm_head.weight` and must find the trained copy there."""
    output = run_sft("qwen2", "run", "--lora_modules_to_save", "lm_head", "--merge", "true")
    head = load_file(output / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    assert torch.equal(merged.lm_head.weight, head)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_u12_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(
    run_sft: RunSFT, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_sft("llama", "run", "--learning_rate", "1e30", "--save_steps", "1", "--max_grad_norm", "0")
    assert stopped.value.code == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: the (loss|gradient norm) of step \d is \S+, on rows ", message), message
    kept = re.search(r"(checkpoint-\d) is kept", message)
    assert kept
    saved = load_file(tmp_path / "run" / kept[1] / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert (tmp_path / "run" / "run.json").exists()  # what a checkpoint of a quantised run is merged by
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_last_step_that_diverges_ends_in_an_error_and_gives_no_figures(
    run_sft: RunSFT, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max_steps", "1", "--learning_rate", "1e30", "--warmup_steps", "0", "--eval_strategy", "no"]
    with pytest.raises(SystemExit) as stopped:
        run_sft("llama", "run", *flags)
    assert stopped.value.code == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.match(
        r"error: the test loss after training is (nan|inf), so .* lower learning_rate \(now 1e\+30", message
    )
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_another_runs_folder_is_kept_unless_overwriting_is_asked_for(
    run_sft: RunSFT, capfd: pytest.CaptureFixture[str]
) -> None:
    output = run_sft("gpt2", "run")
    before = adapter_bytes(output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run_sft("gpt2", "run", "--seed", "7")
    assert "--overwrite" in capfd.readouterr().err
    assert adapter_bytes(output) == before
    run_sft("gpt2", "run", "--seed", "7", "--overwrite")
    assert adapter_bytes(output) != before
    assert (output / "notes.txt").read_text() == "mine"


def test_a_cpu_trains_in_mixed_precision_if_it_is_told_to(run_sft: RunSFT) -> None:
    full, mixed = run_sft("llama", "full"), run_sft("llama", "mixed", "--precision", "bf16")
    assert json.loads((mixed / "run.json").read_text())["arguments"]["bf16"] is True
    assert losses(mixed) != losses(full)
    assert losses(mixed) == pytest.approx(losses(full), rel=1e-2)
    assert {tensor.dtype for tensor in load_file(mixed / "adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_fused_form_trains_what_the_reference_form_trains(run_sft: RunSFT, kind: str) -> None:
    flags = ["--learning_rate", "1e-3", "--logging_steps", "2", "--lora_backend"]
    reference = run_sft(kind, "reference", *flags, "reference")
    fused = run_sft(kind, "fused", *flags, "fused")
    assert losses(fused) == pytest.approx(losses(reference), rel=1e-6)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (fused, reference))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():  # Adam makes a full step of any gradient, be it rounding alone
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    figures = [json.loads((folder / "all_results.json").read_text()) for folder in (fused, reference)]
    assert figures[0]["eval_loss_adapter"] == pytest.approx(figures[1]["eval_loss_adapter"], rel=1e-5)
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (fused, reference)]
    for entry in logs[0]:
        if "loss" in entry:
            assert 0 <= entry["mean_token_accuracy"] <= 1
            assert entry["entropy"] > 0


def test_a_resumed_fused_run_ends_bit_for_bit_where_an_uninterrupted_one_does(run_sft: RunSFT) -> None:
    whole = run_sft("llama", "whole", "--lora_backend", "fused")
    shutil.copytree(whole / "checkpoint-3", whole.parent / "resumed" / "checkpoint-3")
    resumed = run_sft("llama", "resumed", "--lora_backend", "fused", "--resume_from_checkpoint", "true")
    assert adapter_bytes(resumed) == adapter_bytes(whole)
