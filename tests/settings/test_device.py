"""The number formats that a recipe gets on a device, where nobody typed them."""

from pathlib import Path

import pytest

from plainlora.errors import UserError
from plainlora.settings.precision import list_precisions
from plainlora.settings.programs import CLASSIFY, SFT, Program
from tests.gpu_host import cpu_host, gpu_host

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
        ("dtype: auto\nprecision: fp32\n", [], (False, False, "float32"), (False, False, "float32")),
        ("precision: fp32\n", ["--dtype", "auto"], (False, False, "auto"), (False, False, "auto")),
        ("", ["--dtype", "bfloat16"], (True, False, "bfloat16"), (False, True, "bfloat16")),
        ("fp16: true\n", ["--bf16=true", "--fp16=false"], (True, False, "auto"), (True, False, "auto")),
    ],
)
def test_mixed_precision_is_one_that_the_gpu_has(
    text: str, typed: list[str], on_a100: Formats, on_t4: Formats
) -> None:
    assert formats(A100, text, *typed) == on_a100
    assert formats(T4, text, *typed) == on_t4


@pytest.mark.parametrize("program", [SFT, CLASSIFY])
def test_without_mixed_precision_products_are_in_tf32_where_there_is_such_a_thing(program: Program) -> None:
    Path("recipe.yaml").write_text("model_name_or_path: m\ndataset_name: d\noutput_dir: out\nbf16: false\n")
    flags = ["--config", "recipe.yaml", *(["--lora_query=true"] if program is CLASSIFY else [])]
    with gpu_host(capability=A100):
        assert program.parse(flags).training.tf32 is True
        assert program.parse([*flags, "--bf16=false"]).training.tf32 is None
        assert program.parse([*flags, "--bf16=true"]).training.tf32 is None
    with gpu_host(capability=T4):
        assert program.parse(flags).training.tf32 is None


@pytest.mark.parametrize(
    ("typed", "on_a100", "on_t4"),
    [
        ([], (True, False, "auto"), (False, True, "auto")),
        (["--train_head=true"], (True, False, "float32"), (False, True, "float32")),
        (["--precision=fp32"], (False, False, "float32"), (False, False, "float32")),
    ],
)
def test_a_classifier_has_the_same_mixed_precision(typed: list[str], on_a100: Formats, on_t4: Formats) -> None:
    flags = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=out", "--lora_query=true", *typed]
    for capability, expected in ((A100, on_a100), (T4, on_t4)):
        with gpu_host(capability=capability):
            settings = CLASSIFY.parse(flags)
        assert (settings.training.bf16, settings.training.fp16, settings.model.dtype) == expected


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


FLAGS = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=out", "--use_cpu"]
IN_FP32 = (False, False, "float32")


@pytest.mark.parametrize(
    ("typed", "with_units", "without"),
    [
        # The base as it is stored: autocast rounds its products alone.
        ([], (True, False, "auto"), IN_FP32),
        (["--precision=auto"], (True, False, "auto"), IN_FP32),
        (["--precision=fp32"], IN_FP32, IN_FP32),
        (["--precision=bf16"], (True, False, "auto"), (True, False, "auto")),
        (["--load_in_4bit=true"], (True, False, "bfloat16"), IN_FP32),
        # What was typed stays.
        (["--bf16=false"], IN_FP32, IN_FP32),
        (["--bf16=true"], (True, False, "auto"), (True, False, "float32")),
        (["--dtype=float32"], (True, False, "float32"), IN_FP32),
    ],
)
def test_a_cpu_with_units_for_bfloat16_uses_them(typed: list[str], with_units: Formats, without: Formats) -> None:
    for bf16, expected in ((True, with_units), (False, without)):
        with cpu_host(bf16):
            settings = SFT.parse([*FLAGS, *typed])
        training = settings.training
        assert (training.bf16, training.fp16, settings.model.dtype) == expected


def test_the_reason_for_bfloat16_is_said_and_a_yaml_for_a_gpu_fits_such_a_cpu() -> None:
    Path("recipe.yaml").write_text("fp16: true\ndtype: float16\nload_in_4bit: true\n")
    with cpu_host(bf16=True):
        settings = SFT.read(["--config", "recipe.yaml", *FLAGS])
    assert settings.origins["bf16"] == "this CPU computes in bfloat16"
    assert (settings.training.bf16, settings.training.fp16, settings.model.dtype) == (True, False, "bfloat16")


def test_a_classifier_computes_in_bfloat16_where_the_cpu_has_units_for_it() -> None:
    for bf16, expected in ((True, (True, False, "auto")), (False, IN_FP32)):
        with cpu_host(bf16):
            settings = CLASSIFY.parse([*FLAGS, "--lora_query=true"])
        assert (settings.training.bf16, settings.training.fp16, settings.model.dtype) == expected


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--precision=fp32", "--bf16=true"], "precision fp32 contradicts bf16 true and fp16 false; leave either out"),
        (["--precision=bf16", "--bf16=false"], "precision bf16 contradicts bf16 false and fp16 false; leave"),
    ],
)
def test_a_precision_that_is_contradicted_is_refused(typed: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SFT.parse([*FLAGS, *typed])


def test_precision_holds_on_a_gpu_too() -> None:
    assert formats(A100, "", "--precision=fp32") == IN_FP32
    assert formats(A100, "fp16: true\ndtype: float16\n", "--precision=bf16") == (True, False, "auto")
