"""Pushing with the real client over real HTTP, to the Hub of `tests.hub_server`."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.trainer_utils import get_last_checkpoint

from plainlora import inject
from plainlora.lora.interchange import save_adapter
from tests.conftest import make_model, random_ids
from tests.hub_server import READER, TOKEN, Fault, HubState, HubUser, Outcome, serve_hub
from tests.refusals import snapshot, the_one_line

BASE = "meta-llama/Llama-2-7b-chat-hf"
PNG = b"\x89PNG\r\n\x1a\n"


class Terminal:
    """The person at the terminal, their Hub, and the check that no command shows their token."""

    def __init__(self, user: HubUser, address: str, hub: HubState) -> None:
        self.user, self.address, self.hub = user, address, hub

    def run(self, *command: str | Path, **environment: str | None) -> Outcome:
        outcome = self.user.run(*command, **environment)
        assert not any(token in outcome.out + outcome.err for token in (TOKEN, READER)), outcome
        return outcome

    def push(self, folder: Path, repo: str, *flags: str, **environment: str | None) -> str:
        """Pushes and returns what was said."""
        outcome = self.run("plainlora", "push", "--adapter", folder, "--repo", repo, *flags, **environment)
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
        return outcome.out

    def refused(self, folder: Path, repo: str, *flags: str, **environment: str | None) -> str:
        """Pushes in vain and returns the one line."""
        outcome = self.run("plainlora", "push", "--adapter", folder, "--repo", repo, *flags, **environment)
        return the_one_line(outcome.code, "", outcome.err)


@pytest.fixture(scope="module")
def _connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with serve_hub() as (address, hub):
        user = HubUser(address, tmp_path_factory.mktemp("home"))
        yield Terminal(user, address, hub)
        user.close()


@pytest.fixture
def terminal(_connection: Terminal) -> Terminal:
    """A Hub without repositories."""
    hub = _connection.hub
    for store in (hub.repos, hub.commits, hub.contents, hub.stored_large, hub.parts, hub.faults, hub.requests):
        store.clear()
    return _connection


def make_adapter(folder: Path, base: str, rank: int = 8) -> Path:
    """An adapter's folder as a run leaves it, with what must not be published beside it."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, target_modules=["q_proj", "v_proj", "up_proj"], base_model_name_or_path=base
    )
    model = inject(make_model("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(model, folder)
    (folder / "checkpoint-3").mkdir()
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "notes"):
        (folder / name).write_bytes(b"private")
        (folder / "checkpoint-3" / name).write_bytes(b"private")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of a base on the Hub, large enough to be sent in parts."""
    return make_adapter(tmp_path / "adapter", BASE)


@pytest.fixture
def small_adapter(tmp_path: Path) -> Path:
    """The same, sent in one piece."""
    return make_adapter(tmp_path / "small", BASE, rank=1)


def logits(adapter: Path) -> torch.Tensor:
    """What PEFT makes of a folder."""
    return PeftModel.from_pretrained(make_model("llama"), adapter)(input_ids=random_ids()).logits.detach()


def test_u18_what_is_pushed_can_be_downloaded_and_loaded_with_peft(
    terminal: Terminal, adapter: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(adapter)
    tokenizer.chat_template = None
    (adapter / "loss.png").write_bytes(PNG)
    before = snapshot(adapter)

    said = terminal.push(adapter, "ann/adapter")
    assert f"made {terminal.address}/ann/adapter\n" in said
    assert (
        f"pushed 7 files to ann/adapter: {terminal.address}/ann/adapter/commit/{terminal.hub.head('ann/adapter')}"
        in said
    )
    assert snapshot(adapter) == before

    published = terminal.hub.files("ann/adapter")
    assert set(published) == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "README.md", "loss.png"),
    }
    assert published["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert terminal.hub.repos["ann/adapter"].messages == ["initial commit", "Upload with PlainLoRA"]
    assert len(terminal.hub.parts) > 1  # it went in parts
    assert json.loads(published["adapter_config.json"])["base_model_name_or_path"] == BASE
    card = ModelCard(published["README.md"].decode())
    assert (card.data.base_model, card.data.library_name, card.data.pipeline_tag) == (BASE, "peft", "text-generation")
    assert 'from_pretrained("ann/adapter")' in card.text

    assert terminal.run("download", "ann/adapter", tmp_path / "again").code == 0
    assert torch.equal(logits(tmp_path / "again"), logits(adapter))


def test_a_second_push_is_a_commit_and_a_third_of_the_same_files_none(terminal: Terminal, small_adapter: Path) -> None:
    terminal.push(small_adapter, "adapter")
    first = terminal.hub.head("ann/adapter")
    terminal.hub.commit("ann/adapter", "main", {"notes.md": b"by hand"}, "by hand")
    (small_adapter / "loss.png").write_bytes(PNG)
    said = terminal.push(small_adapter, "ann/adapter", "--commit_message", "With a picture")
    assert "/ann/adapter is there already; the files go to it as a new commit" in said
    assert said.endswith("; left as they were: notes.md\n")
    assert {"loss.png", "notes.md"} <= set(terminal.hub.files("ann/adapter"))
    assert terminal.hub.repos["ann/adapter"].messages[-1] == "With a picture"

    head = terminal.hub.head("ann/adapter")
    assert head != first
    assert "ann/adapter holds these 4 files already" in terminal.push(small_adapter, "ann/adapter")
    assert terminal.hub.head("ann/adapter") == head

    terminal.hub.commit("ann/adapter", "main", {f"{name}.bin": b"" for name in "abcd"}, "by hand")
    assert "; left as they were: a.bin, b.bin, c.bin and 2 more\n" in terminal.push(small_adapter, "ann/adapter")


def test_a_branch_and_a_private_repository(terminal: Terminal, small_adapter: Path) -> None:
    terminal.push(small_adapter, "ann/adapter", "--private", "--revision", "epoch-3")
    assert terminal.hub.repos["ann/adapter"].private
    assert terminal.hub.files("ann/adapter") == {}
    assert "adapter_model.safetensors" in terminal.hub.files("ann/adapter", "epoch-3")
    terminal.push(small_adapter, "ann/adapter", "--private", "--revision", "epoch-3")

    terminal.hub.make_repo("ann/public")
    said = terminal.refused(small_adapter, "ann/public", "--private")
    assert "ann/public is there already, and is public; leave --private out, or give another name" in said


@pytest.mark.parametrize(
    ("repo", "environment", "said"),
    [
        (
            "ann/it",
            {"HF_TOKEN": None},
            "the Hub needs a token, and there is none; log in with `hf auth login`, or set",
        ),
        ("ann/it", {"HF_TOKEN": "hf_wrong"}, "the Hub does not accept the token; make one that may write at http"),
        ("ann/it", {"HF_TOKEN": "hf_\u00e9x"}, "holds characters that no token has"),
        ("ann/it", {"HF_TOKEN": TOKEN[:9] + "\n" + TOKEN[9:]}, "holds characters that no token has"),
        ("", {}, "the repository's name is empty; give USER/NAME"),
        ("ann/it", {"HF_TOKEN": READER}, "the Hub's token of ann may only read; make one that may write at http"),
        ("bob/it", {}, "the repository bob/it cannot be used: the token may not write there"),
        ("bob/new", {}, "the repository bob/new cannot be used: the token may not write there"),
        ("a/b/c", {}, "is not a name of a repository"),
    ],
)
def test_who_may_not_push_is_told_so(
    terminal: Terminal, small_adapter: Path, repo: str, environment: dict[str, str | None], said: str
) -> None:
    terminal.hub.make_repo("bob/it")
    line = terminal.refused(small_adapter, repo, **environment)
    assert said in line
    assert "hf_wrong" not in line
    assert terminal.hub.files("bob/it") == {}
    assert list(terminal.hub.repos) == ["bob/it"]


STORAGE, COMMIT = "^/storage/", "/commit/main$"


def test_a_push_whose_answer_was_lost_is_found_whole_by_the_next(terminal: Terminal, small_adapter: Path) -> None:
    terminal.hub.faults.append(Fault("POST", COMMIT, after=True))
    line = terminal.refused(small_adapter, "ann/adapter")
    assert line.endswith("the branch holds all of it or nothing of it; run the same command again")
    head = terminal.hub.head("ann/adapter")
    assert "ann/adapter holds these 3 files already" in terminal.push(small_adapter, "ann/adapter")
    assert terminal.hub.head("ann/adapter") == head


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (Fault("PUT", STORAGE), r"the push to ann/adapter failed: the connection to \S+ broke: .+; the branch holds"),
        (Fault("PUT", STORAGE, status=500), r"the push to ann/adapter failed: the Hub answered 500: .+; the branch"),
        (Fault("PUT", STORAGE, status=400), r"the push to ann/adapter failed: the Hub answered 400: .+; the branch"),
        (Fault("POST", COMMIT), r"the push to ann/adapter failed: the connection to \S+ broke: .+; the branch holds"),
        (Fault("POST", COMMIT, status=503), r"the push to ann/adapter failed: the Hub answered 503: .+; the branch"),
        (
            Fault("POST", COMMIT, status=400, body=b'{"error": "refused, %s"}' % TOKEN.encode()),
            r"the push to ann/adapter failed: the Hub answered 400: .*refused, \.\.\.; the branch holds all of it",
        ),
        (Fault("GET", "/whoami-v2$", status=500), r"the Hub cannot be logged in to: the Hub answered 500: .+"),
    ],
)  # fmt: skip
def test_u18_a_push_that_fails_for_good_leaves_the_branch_as_it_was(
    terminal: Terminal, adapter: Path, fault: Fault, line: str
) -> None:
    head = terminal.hub.make_repo("ann/adapter").branches["main"][-1]
    terminal.hub.faults.append(Fault(**vars(fault) | {"times": 100}))
    assert re.search(line, terminal.refused(adapter, "ann/adapter"))
    assert terminal.hub.head("ann/adapter") == head
    terminal.hub.faults.clear()
    terminal.push(adapter, "ann/adapter")
    assert len(terminal.hub.files("ann/adapter")) == 3


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/whoami-v2$"), ("POST", "/repos/create$"), ("GET", "/models/ann/adapter$"), ("POST", "/preupload/"),
     ("POST", "/batch$"), ("POST", COMMIT)],
)  # fmt: skip
@pytest.mark.parametrize(
    "body",
    [b"[]", b"{}", b"<html>Log in to the hotel's network</html>", b"[" * 100_000],
    ids=lambda body: body[:9].decode(),
)
def test_a_server_that_is_no_hub_is_told_from_one(
    terminal: Terminal, adapter: Path, method: str, path: str, body: bytes
) -> None:
    terminal.hub.faults.append(Fault(method, path, times=100, status=200, body=body))
    line = terminal.refused(adapter, "ann/adapter")
    assert f"the server at {terminal.address} does not answer as a Hub; check HF_ENDPOINT" in line


def test_a_token_among_the_words_of_a_tensor_file_is_not_published(terminal: Terminal, adapter: Path) -> None:
    """One of an odd kind, that no pattern finds."""
    terminal.hub.users["s3cret"] = ("ann", "write")
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "note": "by s3cret"})
    line = terminal.refused(adapter, "ann/adapter", HF_TOKEN="s3cret")
    assert "adapter_model.safetensors holds your Hub token; take it out before it is published" in line
    assert terminal.hub.files("ann/adapter") == {}


def test_a_server_that_is_not_there(terminal: Terminal, small_adapter: Path) -> None:
    """Its own process would be needed for another address; the server hangs up on everything instead."""
    terminal.hub.faults.append(Fault("GET", "", times=100))
    assert re.search(r"logged in to: the connection to \S+ broke: .+$", terminal.refused(small_adapter, "a"))


def recipe(base: Path, rows: Path, output: Path, *flags: str) -> list[str]:
    return [
        *("recipes/sft.py", "--model_name_or_path", str(base), "--dataset_name", str(rows), "--test_split_size", "8"),
        *("--prompt_template", "alpaca", "--max_length", "256", "--output_dir", str(output), "--use_cpu", "true"),
        *(
            "--max_steps",
            "2",
            "--save_steps",
            "1",
            "--logging_steps",
            "1",
            "--report_to",
            "none",
            "--disable_tqdm",
            "true",
            "--push_to_hub",
            "--exact_match_rows",
            "3",
        ),
        *("--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "1e-2", *flags),
    ]


def test_u18_a_recipe_pushes_what_it_wrote_and_its_token_stays_out_of_every_file(
    terminal: Terminal, model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "my-run"
    command = recipe(model_dirs["llama"], rows_file, output, "--hub_token", TOKEN, "--hub_base_model", BASE)
    terminal.hub.faults.append(Fault("POST", COMMIT, times=100))
    line = the_last_line(terminal.run(*command, HF_TOKEN=None))
    assert re.search(
        rf"the run is saved in {output}, but not pushed: the push to ann/my-run failed: .+; continue with: ", line
    )
    assert get_last_checkpoint(output) is not None
    for path in output.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path

    terminal.hub.faults.clear()
    outcome = terminal.run(*line.partition("continue with: ")[2].split())
    assert outcome.code == 0, outcome.err
    published = terminal.hub.files("ann/my-run")
    assert set(published) == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "README.md", "loss.png", "all_results.json", "run.json"),
    }
    for name, content in published.items():
        assert not re.search(rb"/tmp/|" + re.escape(str(tmp_path)).encode(), content), name
        assert TOKEN.encode() not in content
    assert json.loads(published["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(published["run.json"])["arguments"]["model_name_or_path"] == BASE
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        model_dirs["llama"]
    )
    card = ModelCard(published["README.md"].decode())
    assert card.data.base_model == BASE
    assert f"A LoRA adapter for `{BASE}`" in card.text
    assert "\n| rows trained on | 32 of 32 read |\n" in card.text
    assert "\n| exact_match_rows |  | 3 |\n" in card.text

    terminal.run("download", "ann/my-run", tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(output))

    merged = tmp_path / "merged"
    assert terminal.run("plainlora", "merge", "--adapter", output, "--output", merged, HF_TOKEN=None).code == 0
    assert "a folder of this disk; give its Hub id with --base_model" in terminal.refused(merged, "ann/merged")
    outcome = terminal.run("plainlora", "push", "--model", merged, "--repo", "ann/merged", "--base_model", BASE)
    assert outcome.code == 0, outcome.err
    published = terminal.hub.files("ann/merged")
    assert {"certificate.json", "config.json", "model.safetensors", "chat_template.jinja"} <= set(published)
    certificate = json.loads(published["certificate.json"])
    assert certificate["base"]["identity"]["name"] == BASE
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert hashlib.sha256(published[name]).hexdigest() == certificate["merged"]["sha256"][name]
    assert not any(str(tmp_path).encode() in content for content in published.values())
    card = ModelCard(published["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (BASE, "transformers")
    assert "| precision | float32 |" in card.text
    assert re.search(r"\| perplexity on test rows of rows.jsonl \(\d rows, \d+ tokens\) \| [\d.]+ \|", card.text)


def the_last_line(outcome: Outcome) -> str:
    """The error of a run that trained first, and printed its log."""
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        (["--hub_base_model", BASE], {"HF_TOKEN": None}, "the Hub needs a token, and there is none"),
        (["--hub_base_model", BASE], {"HF_TOKEN": "hf_wrong"}, "the Hub does not accept the token"),
        (["--hub_base_model", BASE, "--hub_model_id", "bob/it"], {}, "the repository bob/it cannot be used: the to"),
        ([], {}, "a folder of this disk; give its Hub id with --hub_base_model"),
        (["--hub_base_model", BASE, "--hub_strategy", "every_save"], {}, "hub_strategy every_save: checkpoints"),
    ],
)  # fmt: skip
def test_u18_a_recipe_that_could_not_push_in_the_end_does_not_start(
    terminal: Terminal, model_dirs: dict[str, Path], rows_file: Path, tmp_path: Path,
    flags: list[str], environment: dict[str, str | None], said: str,
) -> None:  # fmt: skip
    outcome = terminal.run(*recipe(model_dirs["llama"], rows_file, tmp_path / "out", *flags), **environment)
    assert said in the_last_line(outcome)
    assert "LoRA:" not in outcome.out  # no weight was loaded
    assert not (tmp_path / "out").exists()
    assert terminal.hub.repos == {}


def test_a_whole_classifier_and_its_run(
    terminal: Terminal, backbone_dirs: dict[str, Path], texts_file: Path, tmp_path: Path
) -> None:
    outcome = terminal.run(
        *("recipes/classify.py", "--config", "recipes/distilbert-imdb/full.yaml", "--max_steps", "2"),
        *("--model_name_or_path", backbone_dirs["distilbert"], "--dataset_name", texts_file),
        *("--labels", "ham", "spam", "--text_column", "text"),
        *("--output_dir", tmp_path / "run", "--test_split_size", "20", "--validation_split_size", "20"),
        *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--hub_private_repo", "true"),
        *("--push_to_hub", "--hub_base_model", "distilbert/distilbert-base-uncased", "--hub_model_id", "ann/spam"),
    )
    assert outcome.code == 0, outcome.err
    assert "to ann/spam: " in outcome.out
    assert terminal.hub.repos["ann/spam"].private
    published = terminal.hub.files("ann/spam")
    assert {"config.json", "model.safetensors", "confusion.png", "loss.png", "run.json"} <= set(published)
    assert not {"training_args.bin", "trainer_state.json"} & set(published)
    card = ModelCard(published["README.md"].decode()).data
    assert (card.base_model, card.library_name) == ("distilbert/distilbert-base-uncased", "transformers")
    assert "\n| rows trained on | 80 |\n" in published["README.md"].decode()
    terminal.run("download", "ann/spam", tmp_path / "again")
    answers = [
        pipeline("text-classification", str(folder))("win a prize")
        for folder in (tmp_path / "again", tmp_path / "run")
    ]
    assert answers[0] == answers[1]
    assert "'ham'" in str(answers) or "'spam'" in str(answers)


def test_a_whole_model_in_several_files(terminal: Terminal, tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_model("llama").save_pretrained(model, max_shard_size="100KB")
    assert "names no base model; give its Hub id with --base_model" in terminal.refused(model, "ann/model")
    terminal.push(model, "ann/model", "--base_model", BASE)
    published = terminal.hub.files("ann/model")
    assert len([name for name in published if name.endswith(".safetensors")]) > 1
    terminal.run("download", "ann/model", tmp_path / "again")
    ids = random_ids()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(input_ids=ids).logits, make_model("llama")(input_ids=ids).logits)
