"""Refuses a model that does not keep the rows of a batch apart, as `plainlora.fast.isolation` measures it."""

from collections.abc import Sequence

from plainlora.errors import UserError, first_line
from plainlora.fast.isolation import Isolation


def check_isolation(isolation: Isolation, name: str, packing: str | None, batches: Sequence[str]) -> None:
    """Checks that the model predicts from earlier tokens only and keeps the rows of a batch apart.

    Args:
        isolation: The measurements of the model.
        name: The model's name in messages.
        packing: The setting by which rows are packed, if they are.
        batches: The settings of batch sizes above 1.

    Raises:
        UserError: It does not; the error names the dependence, and what to set.
    """
    if not isolation.is_negligible(found := isolation.later()):
        raise UserError(
            f"{name} reads the tokens that it is to predict (they change its outputs by {found.replaced:.0%} of the "
            "effect of earlier tokens): it is not a causal language model; give another base"
        )
    if packing:
        question, setting, advice = isolation.packed, packing, f"set {packing} to false"
    elif batches:
        question, setting, advice = isolation.padded, " and ".join(batches), f"set {' and '.join(batches)} to 1"
    else:
        return
    try:
        found = question()
    except Exception as error:  # a missing argument, kernel or mask: whatever the model's code raises
        raise UserError(f"{setting}: {name} cannot keep rows apart ({first_line(error)}); {advice}") from error
    if not isolation.is_negligible(found):
        raise UserError(
            f"{setting}: in {name} a row's outputs depend on the other rows of its batch (by "
            f"{max(found.replaced, found.alone):.0%} of the effect of preceding text); {advice}"
        )
