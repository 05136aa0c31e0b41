"""Whether memory and disk are enough, as `plainlora.resources.footprint` counts what a run needs."""

from plainlora.doctor.finding import Examination
from plainlora.resources.disk import DiskNeed
from plainlora.resources.footprint import Footprint
from plainlora.resources.peak import MemoryNeed


def examine_resources(footprint: Footprint, examination: Examination) -> None:
    """Says whether the run fits; how much of what it needs stands in the footprint's own table.

    What is alive must fit: else it is an error. Where the margin alone does not, it is a warning.
    """
    _examine_memory(footprint.memory, footprint.device, examination)
    _examine_disk(footprint.disk, examination)


def _examine_memory(memory: MemoryNeed, device: str, examination: Examination) -> None:
    if memory.fits is None or memory.free is None:
        said = f"what a step needs on {device} could not be counted; it is {memory.at_least / 1e9:.1f} GB at least"
        examination.add("note", "resources", "memory", said)
        return
    needed, least = (memory.at_least, "at least ") if memory.needed is None else (memory.needed, "")
    said = f"{least}{needed / 1e9:.1f} GB needed and {memory.free / 1e9:.1f} GB free on {device}"
    if memory.fits:
        examination.add("ok", "resources", "memory", said)
        return
    said += "; lower per_device_train_batch_size or max_length"
    said += "" if memory.checkpointing else ", or set gradient_checkpointing"
    if least or needed - (memory.margin or 0) > memory.free:
        examination.add("error", "resources", "memory", said)
    else:
        examination.add("warning", "resources", "memory", said)


def _examine_disk(disk: DiskNeed, examination: Examination) -> None:
    said = f"{disk.needed / 1e9:.2f} GB needed and {disk.free / 1e9:.1f} GB free"
    if disk.fits:
        examination.add("ok", "resources", "disk", said)
    else:
        examination.add("error", "resources", "disk", f"{said}; set save_total_limit, or another output_dir")
