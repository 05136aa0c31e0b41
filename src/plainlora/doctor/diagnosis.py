"""The result of examining a recipe."""

from dataclasses import dataclass, field

from plainlora.data.classification import TextReport
from plainlora.data.encoding import EncodingReport
from plainlora.doctor.finding import Examination
from plainlora.doctor.sample import Segment
from plainlora.doctor.settings import Setting
from plainlora.resources.devices import Devices
from plainlora.resources.footprint import Footprint


@dataclass
class Diagnosis:
    """The result of examining a recipe.

    Attributes:
        config: The recipe's YAML.
        program: The program of `recipes/` for it.
        planned_for: The devices that the run is planned for, if not this machine's.
        examination: All findings.
        settings: The values of the main settings.
        precisions: The number formats, from `list_precisions`.
        reports: The counts of each split's rows.
        sample: One training row, split into trained and untrained parts.
        sample_label: The class of that row, for a classifier.
        footprint: The memory, disk space and time that the run needs; `None` if it could not be estimated.
    """

    config: str
    program: str
    planned_for: Devices | None = None
    examination: Examination = field(default_factory=Examination)
    settings: list[Setting] = field(default_factory=list)
    precisions: dict[str, str] = field(default_factory=dict)
    reports: dict[str, EncodingReport] | dict[str, TextReport] = field(default_factory=dict)
    sample: list[Segment] = field(default_factory=list)
    sample_label: str | None = None
    footprint: Footprint | None = None
