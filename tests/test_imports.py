"""Imports point one way, as CONTRIBUTING.md says."""

import ast
from pathlib import Path

from tests.conftest import ROOT

# Packages whose own module says what they are for, and nothing else.
PLAIN = {"base", "data", "hub", "lora", "merging", "provenance", "resources", "settings", "training"}

# Every module may import from the ranks before its own, and from the siblings listed beside it.
RANKS = [
    {"lora.containment", "lora.errors", "lora.module_to_save", "lora.time_limit"},
    {
        "data.lengths",
        "resources.heap",
        "interruption",
        "json_files",
        "memory_limit",
        "progress",
        "quiet",
        "merging.reload",
        "training.evaluation_loss",
        "settings.renames",
        "swiglu",
    },
    {"errors"},
    {"folders", "lora.storage", "lora.config", "settings.arguments", "base.dropout", "base.files"},
    {"lora.fused", "lora.layer", "settings.adapter"},
    {"lora.targets"},
    {"lora.record"},
    {"lora.interchange"},
    {"lora.inject"},
    {"lora.merge", "lora.load"},
    {
        "settings.parsing",
        "training.run_folder",
        "hub.repository",
        "resources.memory",
        "plots",
        "data.prompts",
        "data.datasets",
        "data.labels",
        "base.failures",
    },
    {"data.layouts", "data.beginnings"},
    {"data.coverage", "data.spans"},
    {"fusing", "kinds", "loss", "report", "data.encoding", "data.classification"},
    {"loss_head"},
    {"settings.checks", "training.checkpoints", "training.isolation"},
    {"base.config", "base.remote_code"},
    {"base.loading", "base.tokenizer"},
    {"base.classifier"},
    {"provenance.base_identity", "provenance.record"},
    {
        "provenance.adapter_base",
        "backends",
        "merging.certificate",
        "generation",
        "hub.model_card",
        "merging.probes",
        "settings.programs",
    },
    {"hub.publication", "provenance.reproduction", "provenance.resumption", "training.saving", "training.watching"},
    {"hub.pushing"},
    {
        "resources.activations",
        "training.trainers",
        "merging.merge",
        "methods",
        "prediction",
        "training.preparation",
    },
    {"resources.weights", "training.evaluation", "training.metrics"},
    {"resources.checkpointing", "resources.plan"},
    {"resources.disk", "resources.duration", "resources.peak"},
    {"resources.footprint"},
    {"doctor", "doctor.finding"},
    {
        "doctor.layers",
        "doctor.learning_rate",
        "doctor.precision",
        "doctor.resources",
        "doctor.sample",
        "doctor.settings",
        "doctor.tokens",
    },
    {"doctor.base", "doctor.diagnosis", "doctor.rows", "doctor.texts"},
    {"doctor.classifier", "doctor.language"},
    {"doctor.examine"},
    {"doctor.report"},
    {"parity", "parity.case"},
    {"parity.shrink", "parity.sides", "parity.tiny"},
    {"parity.suite", "parity.tolerances"},
    {"parity.sources"},
    {"parity.observe"},
    {"parity.compare"},
    {"parity.architectures", "parity.report"},
    {"parity.architecture_table"},
    {"experiments", "experiments.runs"},
    {"experiments.search", "experiments.table"},
    {"experiments.sweep"},
    {"bench", "bench.case", "bench.counting", "bench.profiling", "bench.rows"},
    {"bench.turns"},
    {"bench.baton"},
    {"bench.classify", "bench.head", "bench.language", "bench.layer", "bench.lifecycle", "bench.worker"},
    {"bench.race", "bench.suites"},
    {"bench.report"},
    {f"commands.{verb}" for verb in ("bench", "compare", "doctor", "generate", "merge", "predict", "push")},
    {f"commands.{verb}" for verb in ("reproduce", "sweep", "table")},
    {"commands"},
]


def modules() -> dict[str, Path]:
    source = ROOT / "src" / "plainlora"
    found = {}
    for path in source.rglob("*.py"):
        name = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = path
    return found


def imported(path: Path) -> set[str]:
    """Names of this package's modules that a file imports, at its top or inside a function."""
    names = set()
    known = set(modules())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("plainlora").lstrip(".") for name in names if name.split(".")[0] == "plainlora"}
    return {name for name in inside if name in known and name}


def test_every_module_has_a_rank() -> None:
    assert set(modules()) - PLAIN - {""} == set().union(*RANKS)


def test_imports_point_down_the_ranks() -> None:
    rank = {name: number for number, names in enumerate(RANKS) for name in names}
    checked = 0
    for name, path in modules().items():
        for target in imported(path) - PLAIN:
            if name:
                assert rank[target] < rank[name], f"{name} imports {target}"
                checked += 1
    assert checked > 30


def test_the_method_imports_none_of_its_siblings_and_no_trainer() -> None:
    for path in (ROOT / "src" / "plainlora" / "lora").glob("*.py"):
        text = path.read_text()
        assert all(name.startswith("lora.") for name in imported(path) - {"lora"}), path
        assert not any(f"import {library}" in text or f"from {library}" in text for library in ("trl", "datasets"))


def test_recipes_are_never_imported_and_there_is_no_drawer_for_everything() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        assert "recipes" not in {name.split(".")[0] for name in imported(path)}
        assert path.name != "utils.py"
