"""Engines compute the same: the whole matrix, a lifecycle on each config that ships, and two machines as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from plainlora.run.folder import list_checkpoints
from tests.conftest import ROOT
from tests.engines import matrix
from tests.engines.matrix import LIMITS, Launch, Result

LIFECYCLE = ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2", "fsdp2_qlora")
# What is refused or fails, by case and engine; everything else holds.
KNOWN: dict[tuple[str, str], str] = {}


@pytest.mark.slow
def test_every_cell_holds_or_is_refused_by_name(tmp_path: Path) -> None:
    results = matrix.run(list(matrix.cells()), tmp_path)
    assert len(results) == 129
    assert {(each.case, each.engine): each.text for each in results if not each.holds} == KNOWN


def test_the_table_of_the_docs_has_every_cell_and_the_limits_of_today() -> None:
    content = json.loads((matrix.DOCS / "matrix.json").read_text())
    results = matrix.known(matrix.DOCS)
    assert [(cell["case"], cell["engine"]) for cell in content["cells"]] == [(r.case, r.engine) for r in results]
    assert len(results) == 129
    assert content["limits"] == LIMITS
    assert [each.holds for each in results] == [cell["holds"] for cell in content["cells"]]
    judged = [each for each in results if each.problem != matrix.NOT_RUN]
    assert {(each.case, each.engine): each.text for each in judged if not each.holds} == KNOWN
    assert matrix.table(results) in (matrix.DOCS / "matrix.md").read_text()


def test_every_config_that_ships_is_launched() -> None:
    elsewhere = {"cpu", "single_gpu"}  # tests/recipes/test_launch.py
    assert {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")} == {
        *LIFECYCLE, "multi_node", *elsewhere
    }  # fmt: skip


def train(steps: int, name: str, config: str, processes: int, *flags: str) -> Launch:
    """A run with evaluations, a merge and answers, and no checkpoint before its end."""
    given = ("--max_steps", str(steps), "--save_strategy", "steps", "--save_steps", "1000", *matrix.WHOLE)
    return Launch(name, config, processes, 400, (*given, *flags))


def differences(found: Path, expected: Path) -> dict[str, float]:
    return {name: matrix.compare(name, found, expected) for name in LIMITS}


def assert_within_limits(measured: dict[str, float]) -> None:
    assert {name: value for name, value in measured.items() if value > LIMITS[name]} == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs lie beside each other; one that is there is not repeated."""
    return tmp_path_factory.mktemp("engines")


@pytest.mark.integration
@pytest.mark.parametrize("config", LIFECYCLE)
def test_a_run_that_is_stopped_goes_on_to_what_one_process_computes(config: str, folder: Path) -> None:
    """Trained with evaluations, stopped by SIGTERM, resumed, merged, asked: as one process that is not stopped."""
    base = matrix.NF4 if config == "fsdp2_qlora" else ()
    alone = train(30, f"one process {' '.join(base)}", "cpu", 1, *base)
    assert matrix.carry_out(alone, folder) == ""
    launch = train(30, config, config, 2, *base)
    stop_in_training(launch, folder)
    (stopped,) = list_checkpoints(folder / config)
    assert 0 < int(stopped.name.partition("-")[2]) < 30
    assert not (folder / config / "adapter_model.safetensors").exists()
    on = replace(launch, flags=(*launch.flags, "--resume_from_checkpoint", "true"))
    assert matrix.carry_out(on, folder) == ""
    assert_within_limits(differences(folder / config, folder / alone.name))


def stop_in_training(launch: Launch, folder: Path) -> None:
    """Launches a run, and tells the launcher to end when the first step has been logged."""
    process = subprocess.Popen(
        matrix.command_of(launch, folder), cwd=ROOT, env=matrix.environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    end = threading.Timer(matrix.LONGEST, os.killpg, (process.pid, signal.SIGKILL))
    end.start()
    try:
        assert process.stdout is not None
        before = []
        while "'loss'" not in (line := process.stdout.readline()):
            before.append(line)
            assert line, "".join(before)
        process.terminate()
        said = process.stdout.read()
        assert process.wait() != 0
    finally:
        end.cancel()
    assert said.count("stopped after step ") == 1, said


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch_together(commands: list[list[str]], log: Path, **variables: str) -> None:
    """Carries out commands at the same time, as machines do."""
    with log.open("w") as stream:
        machines = [
            subprocess.Popen(
                command, cwd=ROOT, env=matrix.environment() | {"GLOO_SOCKET_IFNAME": "lo"} | variables, stdout=stream,
                stderr=stream, start_new_session=True,
            )
            for command in commands
        ]  # fmt: skip
    try:
        for machine in machines:
            assert machine.wait(matrix.LONGEST) == 0, log.read_text()
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def one_machine(folder: Path) -> Path:
    """Six steps in two processes of one machine."""
    assert matrix.carry_out(train(6, "one machine", "ddp", 2), folder) == ""
    return folder / "one machine"


@pytest.mark.integration
def test_two_machines_compute_what_two_processes_of_one_do(one_machine: Path) -> None:
    folder, port = one_machine.parent, str(free_port())
    command = matrix.command_of(train(6, "two machines", "multi_node", 2), folder)
    at = command.index("recipes/sft.py")
    place = ("--main_process_ip", "127.0.0.1", "--main_process_port", port)
    machines = [[*command[:at], "--machine_rank", rank, *place, *command[at:]] for rank in ("0", "1")]
    launch_together(machines, folder / "machines.log")
    assert set(differences(folder / "two machines", one_machine).values()) == {0.0}


@pytest.mark.integration
def test_the_slurm_script_starts_a_launcher_on_each_machine(one_machine: Path, tmp_path: Path) -> None:
    """`srun` and `scontrol` are written here, as Slurm documents them: this is no cluster. The rest is as it ships."""
    commands = {
        "accelerate": f'exec {sys.executable} -m accelerate.commands.accelerate_cli "$@"',
        "scontrol": '[ "$*" = "show hostnames machine[0-1]" ] && echo 127.0.0.1 && echo machine1',
        "srun": 'SLURM_NODEID=0 "$@" & first=$!; SLURM_NODEID=1 "$@"; second=$?; wait $first && exit $second',
    }
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    command = matrix.command_of(train(6, "slurm", "multi_node", 2), one_machine.parent)
    slurm = {"SLURM_JOB_NODELIST": "machine[0-1]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    job = ["bash", "recipes/launch/slurm.sbatch", *command[command.index("recipes/sft.py") :]]
    path = f"{tmp_path}:{os.environ['PATH']}"
    launch_together([job], tmp_path / "slurm.log", PATH=path, MAIN_PORT=str(free_port()), **slurm)
    assert set(differences(one_machine.parent / "slurm", one_machine).values()) == {0.0}


def write_run(
    folder: Path, loss: float = 2.0, evaluation: float = 3.0, weight: float = 1.0, answer: str = "a"
) -> Path:
    """The files of a run that are compared."""
    base = load_file(ROOT / "recipes" / "quickstart" / "base" / "model.safetensors")
    (folder / "merged").mkdir(parents=True)
    history = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": loss}, {"step": 2, "eval_loss": evaluation}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    figures = {f"{name}_{which}": 3.0 for name in ("eval_loss", "exact_match") for which in ("base", "adapter")}
    (folder / "all_results.json").write_text(json.dumps(figures))
    (folder / "samples.md").write_text(f"{answer}\n")
    adapter = torch.ones(1000)
    adapter[0] = weight
    save_file({"lora_A": torch.ones(4), "lora_B": adapter}, folder / "adapter_model.safetensors")
    merged = {name: tensor + 0.01 * (weight if "q_proj" in name else 1) for name, tensor in base.items()}
    save_file(merged, folder / "merged" / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"loss": 2.0001}, {"losses"}),
        ({"evaluation": 3.00001}, {"evaluation"}),
        ({"weight": 1.01}, {"adapter", "merged"}),
        ({"answer": "b"}, {"answers"}),
    ],
)
def test_a_difference_beyond_its_limit_is_found(change: dict[str, Any], names: set[str], tmp_path: Path) -> None:
    expected, found = write_run(tmp_path / "expected"), write_run(tmp_path / "found", **change)
    assert set(differences(expected, expected).values()) == {0.0}
    measured = differences(found, expected)
    assert {name for name, value in measured.items() if value > LIMITS[name]} == names
    assert not Result("case", "engine", measured, "").holds
    assert Result("case", "engine", measured, "").text.startswith("**FAILS: ")


def test_what_a_launch_says_of_its_end_is_told_in_a_line() -> None:
    refused = "torch warns\nerror: FSDP2 cannot do it; leave it out\nTraceback\nChildFailedError: \n"
    assert matrix.why(2, refused, begun=False) == "refused: FSDP2 cannot do it; leave it out"
    assert matrix.why(2, refused, begun=True) == "FAILS: FSDP2 cannot do it; leave it out"
    broken = "[rank1]: AttributeError: no quant_state\ntorch.elastic.ChildFailedError: \n"
    assert matrix.why(1, broken, begun=True) == "FAILS: AttributeError: no quant_state"
    assert matrix.why(-11, "", begun=True) == "FAILS: exit code -11"
    assert matrix.why(None, refused, begun=True) == "FAILS: it hung; it was killed after 600 s"
