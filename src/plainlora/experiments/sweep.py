"""A search for better hyperparameters by Optuna: each trial is a run, evaluated on validation rows."""

import json
import math
import platform
import shlex
import shutil
import sqlite3
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from plainlora.errors import UserError
from plainlora.experiments.runs import Outcome, duration, flag_names, locked_folder, resolve, run_recipe
from plainlora.experiments.scores import judging_of, read_figure
from plainlora.experiments.search import default_search, no_projection, own_values, parse_search, parse_spec, to_flags
from plainlora.markdown import table
from plainlora.plots import plot_trials
from plainlora.report import package_versions, write_json
from plainlora.settings.programs import Program, find_program
from plainlora.settings.secrets import config_without_secrets, without_secrets

FAILURES_IN_A_ROW = 3  # then the config or the machine is at fault, not the trial's values


@dataclass(frozen=True)
class Plan:
    """The inputs of a study. A study can only be continued with the same plan.

    Attributes:
        program: The recipe's program.
        config: The recipe's YAML.
        settings: Every setting of a run, before the search.
        search: Names and specs.
        metric: The figure of a run to optimise.
        flags: The flags of every trial.
    """

    program: Program[Any]
    config: str
    settings: dict[str, Any]
    search: dict[str, str]
    metric: str
    flags: list[str]

    @property
    def space(self) -> dict[str, BaseDistribution]:
        """The specs, as Optuna reads them."""
        return {name: parse_spec(name, spec) for name, spec in self.search.items()}

    def record(self) -> dict[str, Any]:
        """The settings that must not change between two calls, as read back from JSON."""
        config, flags = config_without_secrets(self.config), without_secrets(self.flags)
        record = {"config": config, "search": self.search, "metric": self.metric, "flags": flags}
        return dict(json.loads(json.dumps(record, default=str)))

    def differences(self, then: dict[str, Any]) -> list[str]:
        """The differences from an earlier record, in words."""
        found = []
        for part, now in self.record().items():
            if isinstance(now, dict):
                before = then[part]
                names = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
                found += [f"{part}: {name} was {before.get(name)}, is {now.get(name)}" for name in names]
            elif now != then[part]:
                found.append(f"{part} was {_plain(then[part])}, is {_plain(now)}")
        return found


def _plain(value: object) -> str:
    return " ".join(value) or "none" if isinstance(value, list) else str(value)


def open_study(plan: Plan, output: Path, seed: int) -> optuna.Study:
    """Opens the folder's study, or makes a new one. The config's own values are tried first.

    A trial that a killed sweep left running is marked as failed, and its values are tried again.

    Args:
        plan: The study's plan.
        output: The study's folder.
        seed: Seed of the sampler; the number of trials is added, so that a continued study draws new values.

    Raises:
        UserError: The study has results of another plan, or cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    minimize = plan.metric.endswith(("loss", "perplexity"))
    direction = StudyDirection.MINIMIZE if minimize else StudyDirection.MAXIMIZE
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{output / 'study.db'}")
        study = optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)
        if study.trials and (differences := plan.differences(study.user_attrs["plan"])):
            if finished(study):
                raise UserError(
                    f"{output} holds a sweep with other settings ({'; '.join(differences)}); give another --output_dir"
                )
            optuna.delete_study(study_name="sweep", storage=storage)
            study = optuna.create_study(storage=storage, study_name="sweep", direction=direction)
    except (SQLAlchemyError, sqlite3.Error, RuntimeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{output / 'study.db'} cannot be read ({reason}); give another --output_dir") from error
    if not study.trials:
        study.set_user_attr("plan", plan.record())
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)
        shutil.rmtree(output / _folder(trial.number), ignore_errors=True)
    if not study.get_trials(states=(TrialState.WAITING, TrialState.COMPLETE)):
        study.enqueue_trial(own_values(plan.program, plan.space, plan.settings))
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _folder(number: int) -> str:
    return f"trial-{number:03}"


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have a value."""
    return study.get_trials(states=(TrialState.COMPLETE,))


def sweep(
    config: str,
    trials: int,
    search: Sequence[str] | None,
    output_dir: str | None,
    seed: int,
    metric: str | None,
    flags: Sequence[str],
) -> None:
    """Runs trials until there are enough, and writes `sweep.md`, `sweep.json` and `sweep.png`.

    Args:
        config: The recipe's YAML.
        trials: The number of finished trials to reach, including those of earlier calls.
        search: `NAME=SPEC` words; the finetuning mode's defaults if left out.
        output_dir: The study's folder; `outputs/<folder>-<name>-sweep` if left out.
        seed: Seed of the sampler.
        metric: Name of the figure in a run's `all_results.json`, without `_adapter`; the program's if left out.
        flags: More of the recipe's flags, for every trial.

    Raises:
        UserError: An argument is wrong, the working directory is not a checkout's root, the first run or several in a
            row fail, or a run has no such figure.
    """
    if trials < 1:
        raise UserError(f"--trials must be at least 1, not {trials}")
    if seed < 0:
        raise UserError(f"--seed must be at least 0, not {seed}")
    settings, fixed, program = resolve(config, flags, {}), flag_names(flags), find_program(config, flags)
    judging = judging_of(program)
    metric = judging.metric if metric is None else metric
    if metric not in judging.metrics:
        raise UserError(f"--metric {metric}: a sweep of {program.path} can optimise {', '.join(judging.metrics)}")
    specs = default_search(program, settings, fixed) if search is None else parse_search(program, search, fixed)
    if not specs:
        raise UserError("nothing is left to search: every default is given by a flag; name others with --search")
    plan = Plan(program, config, settings, specs, metric, list(flags))
    if output_dir is None:
        output_dir = f"outputs/{Path(config).absolute().parent.name}-{Path(config).stem}-sweep"
    program.find()
    with locked_folder(output_dir) as output:
        study = open_study(plan, output, seed)
        try:
            _run_all(study, plan, output, trials)
        finally:
            if finished(study):
                _write(study, plan, output)


def _run_all(study: optuna.Study, plan: Plan, output: Path, trials: int) -> None:
    clock: list[float] = []
    failures = 0
    if done := len(finished(study)):
        print(f"{done} trials are finished already", flush=True)
    while (done := len(finished(study))) < trials:
        trial = study.ask(plan.space)
        line = f"{done + 1}/{trials}  "
        if no_projection(trial.params, plan.settings):
            study.tell(trial, state=TrialState.PRUNED)
            continue
        if twin := next((known for known in finished(study) if known.params == trial.params), None):
            for name, attribute in twin.user_attrs.items():
                trial.set_user_attr(name, attribute)
            study.tell(trial, twin.value)
            print(f"{line}the same as trial {twin.number}: {_shown(trial.params)}", flush=True)
            continue
        folder = output / _folder(trial.number)
        trial.set_user_attr("output_dir", folder.name)
        try:
            outcome = run_recipe(plan.config, [*plan.flags, *to_flags(plan.program, trial.params)], folder)
            value = _value(outcome, plan, folder)
        except UserError as error:
            failures += 1
            trial.set_user_attr("reason", str(error))
            study.tell(trial, state=TrialState.FAIL)
            if failures == FAILURES_IN_A_ROW or not finished(study):
                which = "the first run" if not finished(study) else f"{failures} runs in a row"
                raise UserError(f"{which} failed: {error}") from error
            print(f"{line}failed: {error}  {_shown(trial.params)}", flush=True)
            continue
        failures = 0
        if outcome.seconds is not None:
            clock.append(outcome.seconds)
        scores = [score.name for score in judging_of(plan.program).scores]
        for name in (*scores, "trainable_params", "train_runtime"):
            trial.set_user_attr(name, read_figure(outcome.results, name))
        study.tell(trial, value)
        line += f"{plan.metric} {value:.4f}  best {study.best_value:.4f}  {_shown(trial.params)}"
        if clock and done + 1 < trials:
            line += f"  about {duration(statistics.fmean(clock) * (trials - done - 1))} left"
        print(line, flush=True)


def _value(outcome: Outcome, plan: Plan, folder: Path) -> float:
    value = read_figure(outcome.results, plan.metric)
    if value is None:
        advice = judging_of(plan.program).advice
        raise UserError(f"{folder}/all_results.json has no {plan.metric}; {advice}")
    return float(value)


def _shown(parameters: dict[str, Any]) -> str:
    """Parameters for a message, without switches that are off: `learning_rate 0.00023, lora_r 8, lora_query`."""
    on = {name: value for name, value in parameters.items() if value != "false"}
    return ", ".join(name if value == "true" else f"{name} {_short(value)}" for name, value in on.items())


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def best_command(plan: Plan, parameters: dict[str, Any]) -> str:
    """The command line of one trial."""
    launch = ["accelerate", "launch", "--config_file", "accelerate_configs/single_gpu.yaml"]
    flags = [*without_secrets(plan.flags), *to_flags(plan.program, parameters)]
    words = [str(plan.program.path), "--config", plan.config, *flags]
    return shlex.join([*launch, *words])


def _state(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL:
        return "failed" if "reason" in trial.user_attrs else "interrupted"
    return {TrialState.COMPLETE: "finished", TrialState.PRUNED: "not run: no projection"}.get(trial.state, "open")


def _as_record(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
        "state": _state(trial),
        "parameters": trial.params,
        "seconds": trial.duration.total_seconds() if trial.duration else None,
    } | trial.user_attrs


def markdown(records: Sequence[dict[str, Any]], metric: str) -> str:
    """A table of all finished and failed trials, the best first."""
    names = list(dict.fromkeys(name for record in records for name in record["parameters"]))
    rows = []
    for record in records:
        if record["state"] in ("finished", "failed"):
            value = f"{record['value']:.4f}" if record["state"] == "finished" else "failed"
            cells = [_short(record["parameters"].get(name, "")) for name in names]
            rows.append([record["trial"], value, *cells, f"{record['seconds']:.0f}"])
    failed = [record for record in records if record["state"] == "failed"]
    reasons = [f"\nTrial {record['trial']} failed: {record['reason']}" for record in failed]
    return "\n".join([table(["trial", metric, *names, "seconds"], rows), *reasons])


def _write(study: optuna.Study, plan: Plan, output: Path) -> None:
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    records = [_as_record(trial) for trial in study.trials if trial.state.is_finished()]
    records.sort(key=lambda record: math.inf if record["value"] is None else sign * record["value"])
    best, command = records[0], best_command(plan, study.best_params)
    versions = package_versions() | {"optuna": version("optuna"), "python": platform.python_version()}
    write_json(
        output / "sweep.json",
        {"trials": records, "plan": plan.record(), "best_command": command, "versions": versions},
    )
    summary = f"best of {len(finished(study))}: trial {best['trial']}, {plan.metric} {best['value']:.4f}"
    judging = judging_of(plan.program)
    for score in judging.scores:
        if score.name != plan.metric and best.get(score.name) is not None:
            summary += f", {score.name} {best[score.name]:.4f}"
    advice = "The best of many trials is partly luck: run it under another seed, with --seed N, before you believe it."
    advice += judging.caution
    signature = ", ".join(f"{name} {number}" for name, number in versions.items())
    text = f"{summary}\n\n    {command}\n\n{advice}"
    table = markdown(records, plan.metric)
    (output / "sweep.md").write_text(f"{text}\n\n{table}\n\n{signature}\n", encoding="utf-8")
    values = [(trial.number, float(trial.value)) for trial in finished(study) if trial.value is not None]
    plot_trials(values, plan.metric, sign < 0, output / "sweep.png")
    print(f"\n{text}\n\nsweep.md, sweep.json, sweep.png: {output}")
