"""The tolerance of every level, with its reason: the only table of tolerances."""

from dataclasses import dataclass

from plainlora.parity.case import Case


@dataclass(frozen=True)
class Tolerance:
    """The tolerance of a level.

    Attributes:
        relative: Largest difference divided by the largest value of a tensor (dimensionless).
        reason: The reason for it.
        follows: Prefix of the names of tensors whose values follow from others; unless `relative` is zero, only their
            shapes and dtypes are compared.
    """

    relative: float
    reason: str
    follows: str | None = None


ADAM = "Adam divides a gradient by its own size, so rounding may reverse a weight's step; weights are not compared"
PRODUCT = "W + s B A summed in one product, where PEFT adds a rounded one"

# Names, dtypes, shapes, config fields, trained parameters, saved bytes and round trips must be equal.
TOLERANCES = {
    "same order": Tolerance(0.0, "the same operations in the same order"),
    "drawn": Tolerance(0.0, "drawn from one random stream"),
    "chosen": Tolerance(0.0, "the likeliest tokens"),
    "float64": Tolerance(1e-12, "the same sum in another order, in fp64"),
    "float32": Tolerance(1e-6, "the same sum in another order, in fp32"),
    "half": Tolerance(1e-2, "each term rounded to half precision, in another order"),
    "fused half": Tolerance(5e-2, "A and B compute in the base's precision, PEFT's in their own; one is half"),
    "trajectory": Tolerance(1e-6, f"losses in fp32, which TRL's head computes for any base; {ADAM}", "final "),
    "half trajectory": Tolerance(1e-2, f"each term rounded to half precision; {ADAM}", "final "),
    "merge float64": Tolerance(1e-12, f"{PRODUCT}, in fp64"),
    "merge float32": Tolerance(1e-6, f"{PRODUCT}, in fp32"),
    "merge float16": Tolerance(2**-10, f"{PRODUCT}: one rounding unit; the logits follow", "logits"),
    "merge bfloat16": Tolerance(2**-7, f"{PRODUCT}: one rounding unit; the logits follow", "logits"),
}
BLURRED = (TOLERANCES["float32"], TOLERANCES["merge float32"])  # may be raised by `last_bits_of`
HALF = ("float16", "bfloat16")
LAST_BITS = 3  # one random change of the last bits shows the size of rounding, not its bound
NEAR_TIES = "in half precision rounding may decide between two nearly equally likely tokens, and so all after them"
BY_LAST_BITS = f"rounding of fp32: {LAST_BITS} times the change of PEFT's own result if all weights' last bits change"


def tolerance_for(level: str, case: Case, environment: dict[str, str], quantised: bool) -> Tolerance:
    """The tolerance of a level of a case.

    On a CPU the reference form computes the same as PEFT in the same order, except that PEFT rounds the adapter's
    output to the dtype of a quantised base before adding it. The fused form sums in another order, and in the base's
    dtype. On a GPU the order is not defined. Merging sums in another order than PEFT for both forms.

    Args:
        level: One of `LEVELS`.
        case: The form that is compared, and the adapter's dtype.
        environment: See `CaseResult`.
        quantised: Whether the base is quantised.
    """
    dtype = environment["base dtype"] or "float32"  # unknown if the base could not be loaded
    half = dtype in HALF
    if level in ("init", "generation"):
        return TOLERANCES["drawn" if level == "init" else "chosen"]
    if level == "merge":
        return TOLERANCES[f"merge {dtype}"]
    same_order = (
        case.lora_backend == "reference" and not case.config.use_dora
    )  # of which PEFT forms B A by a product with I
    if same_order and environment["device"] == "cpu" and not (quantised and half):
        return TOLERANCES["same order"]
    fused_half = case.lora_backend == "fused" and (half or case.adapter_dtype in HALF)
    if level == "trajectory":
        return TOLERANCES["half trajectory" if half or fused_half else "trajectory"]
    return TOLERANCES["fused half" if fused_half else "half" if half else dtype]
