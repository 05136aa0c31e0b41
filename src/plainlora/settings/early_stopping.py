"""Gives other settings the values that `early_stopping_patience` needs; refuses values given that contradict it."""

from argparse import Namespace
from collections.abc import Collection
from typing import Any

from plainlora.errors import UserError

SHARE = 0.1  # of the run, after which it is evaluated and saved if no one says how often
WHY = "early_stopping_patience needs it"


def fit_early_stopping(parsed: Namespace, given: Collection[str]) -> dict[str, tuple[Any, str]]:
    """The settings to change so that a run can stop early: name -> new value and reason. Those given are kept.

    Args:
        parsed: Every setting, from the YAML, the command line and the defaults.
        given: Names of the settings that the YAML or the command line gives.

    Raises:
        UserError: A setting that was given contradicts early stopping, or the run would be over before it could stop.
    """
    patience = parsed.early_stopping_patience
    if patience is None or patience < 1:  # refused by `settings/checks.py`
        return {}
    asked = {name: _plain(getattr(parsed, name)) for name in given if hasattr(parsed, name)}
    for name in ("eval_strategy", "save_strategy"):
        if asked.get(name) == "no":
            raise UserError(f"early_stopping_patience: {name} no leaves no checkpoint to judge; set steps or epoch")
    if asked.get("load_best_model_at_end") is False:
        raise UserError("early_stopping_patience saves the best checkpoint; leave load_best_model_at_end out")
    saves = asked.get("save_strategy")
    strategy = asked.get("eval_strategy") or (saves if saves in ("steps", "epoch") else "steps")
    if saves not in (None, "best", strategy):
        raise UserError(
            f"early_stopping_patience saves at every evaluation: eval_strategy is {strategy} and save_strategy "
            f"{saves}; set them to the same"
        )
    needed = {"eval_strategy": strategy, "save_strategy": strategy, "load_best_model_at_end": True}
    if strategy == "steps":
        every = asked.get("eval_steps") or asked.get("save_steps") or SHARE
        needed |= {"eval_steps": every} | ({} if saves == "best" else {"save_steps": every})
        if saves != "best" and asked.get("save_steps", every) != every:
            raise UserError(
                f"early_stopping_patience saves at every evaluation: eval_steps is {every:g} and save_steps "
                f"{asked['save_steps']:g}; set them to the same"
            )
        count = 1 / every if every < 1 else parsed.max_steps / every if parsed.max_steps > 0 else None
    else:
        count = parsed.num_train_epochs if parsed.max_steps <= 0 else None
    if count is not None and count <= patience + 1:
        raise UserError(
            f"early_stopping_patience {patience}: of {count:.3g} evaluations none could stop the run before its end; "
            "lower it, or evaluate more often with eval_strategy steps and eval_steps"
        )
    return {name: (value, WHY) for name, value in needed.items() if name not in asked}


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
