"""The number formats that a recipe gets on a device, where nobody typed them."""

from pathlib import Path

import pytest

from plainlora.errors import UserError
from plainlora.settings.precision import list_precisions
from plainlora.settings.programs import CLASSIFY, SFT, Program
from tests.gpu_host import gpu_host

T4, A100 = (7, 5), (8, 0)
Formats = tuple[bool, bool, str]  # bf16, fp16, dtype


def formats(capability: tuple[int, int], text: str = "", *typed: str) -> Formats:
    """Of a language model's run on a GPU."""
    Path("recipe.yaml").write_text(f"model_name_or_path: m\ndataset_name: d\noutput_dir: out\n{text}")
    with gpu_host(capability=capability):
        settings = SFT.parse(["--config", "recipe.yaml", *typed])
    return settings.training.bf16, settings.training.fp16, settings.model.dtype


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "typed", "on_a100", "on_t4"),
    [
        # TRL's default is bf16; a T4 emulates it. A frozen base is not cast anew at every product.
        ("", [], (True, False, "auto"), (False, True, "auto")),
        ("bf16: true\ndtype: bfloat16\n", [], (True, False, "bfloat16"), (False, True, "float16")),
        ("fp16: true\ndtype: float16\n", [], (False, True, "float16"), (False, True, "float16")),
        ("dtype: float32\n", [], (True, False, "float32"), (False, True, "float32")),
        # What TRL loads in 4 bits computes in `dtype`.
        ("load_in_4bit: true\n", [], (True, False, "bfloat16"), (False, True, "float16")),
        # What was typed stays.
        ("", ["--bf16", "true"], (True, False, "auto"), (True, False, "auto")),
        ("", ["--bf16", "false"], (False, False, "float32"), (False, False, "float32")),
        ("", ["--dtype", "bfloat16"], (True, False, "bfloat16"), (False, True, "bfloat16")),
        ("fp16: true\n", ["--bf16=true", "--fp16=false"], (True, False, "auto"), (True, False, "auto")),
    ],
)
def test_mixed_precision_is_one_that_the_gpu_has(
    text: str, typed: list[str], on_a100: Formats, on_t4: Formats
) -> None:
    assert formats(A100, text, *typed) == on_a100
    assert formats(T4, text, *typed) == on_t4


@pytest.mark.parametrize(("program", "tf32"), [(SFT, None), (CLASSIFY, True)])
def test_a_classifier_multiplies_in_tf32_where_there_is_such_a_thing(program: Program, tf32: bool | None) -> None:
    flags = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=out"]
    flags += ["--lora_query=true"] if program is CLASSIFY else []
    with gpu_host(capability=A100):
        assert program.parse(flags).training.tf32 is tf32
        assert program.parse([*flags, "--bf16=false"]).training.tf32 is None
    with gpu_host(capability=T4):
        assert program.parse(flags).training.tf32 is None


def test_what_a_t4_trains_in_is_said_with_the_reason() -> None:
    flags = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=out", "--load_in_4bit=true"]
    with gpu_host(capability=T4):
        settings = SFT.read(flags)
        _, _, training, model = settings.parts
        compute = list_precisions(training, model, None, "float32")["compute"]
    assert settings.origins["fp16"] == "this GPU has no bfloat16"
    assert compute == "float16, by autocast with loss scaling (this GPU has no bfloat16)"
    with gpu_host(capability=A100):
        _, _, training, model = SFT.parse([*flags, "--dtype=float16"]).parts
        compute = list_precisions(training, model, None, "float32")["compute"]
    assert compute == "bfloat16, by autocast; 4-bit layers in float16"


def test_a_bfloat16_adapter_under_loss_scaling_is_refused() -> None:
    with pytest.raises(UserError, match="adapter_dtype bfloat16: fp16 scales the loss"):
        formats(A100, "fp16: true\nadapter_dtype: bfloat16\n")
    assert formats(A100, "adapter_dtype: bfloat16\n") == (True, False, "auto")
