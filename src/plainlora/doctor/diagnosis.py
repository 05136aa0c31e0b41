"""What there is to say of a recipe."""

from dataclasses import dataclass, field

from plainlora.data.classification import TextReport
from plainlora.data.encoding import EncodingReport
from plainlora.doctor.finding import Examination
from plainlora.doctor.sample import Segment
from plainlora.doctor.settings import Setting
from plainlora.resources.footprint import Footprint


@dataclass
class Diagnosis:
    """What there is to say of a recipe.

    Attributes:
        config: Its YAML.
        program: Which program of `recipes/` it is for.
        examination: Every finding.
        settings: What the settings that matter will be.
        precisions: In which number format what is stored and computed.
        reports: What became of each split's rows.
        sample: One training row, cut where training begins or ends.
        sample_label: The class of that row, for a classifier.
        footprint: What the run needs of memory, disk and time; `None` where it could not be counted.
    """

    config: str
    program: str
    examination: Examination = field(default_factory=Examination)
    settings: list[Setting] = field(default_factory=list)
    precisions: dict[str, str] = field(default_factory=dict)
    reports: dict[str, EncodingReport] | dict[str, TextReport] = field(default_factory=dict)
    sample: list[Segment] = field(default_factory=list)
    sample_label: str | None = None
    footprint: Footprint | None = None
