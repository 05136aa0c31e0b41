"""Checks that memory and disk suffice for what `plainlora.resources.footprint` estimates."""

from plainlora.doctor.finding import Examination
from plainlora.resources.disk import DiskNeed
from plainlora.resources.footprint import Footprint
from plainlora.resources.peak import MemoryNeed


def examine_resources(footprint: Footprint, examination: Examination) -> None:
    """Checks that the run fits into memory and on the disk.

    It is an error if the live bytes do not fit into memory, and a warning if only the margin does not.

    Args:
        footprint: The estimate.
        examination: Gets the findings.
    """
    _examine_memory(footprint.memory, footprint.device, examination)
    _examine_disk(footprint.disk, examination)


def _examine_memory(memory: MemoryNeed, device: str, examination: Examination) -> None:
    if memory.fits is None or memory.free is None:
        message = f"what a step needs on {device} could not be counted; it is {memory.at_least / 1e9:.1f} GB at least"
        examination.add("note", "resources", "memory", message)
        return
    needed, least = (memory.at_least, "at least ") if memory.needed is None else (memory.needed, "")
    message = f"{least}{needed / 1e9:.1f} GB needed and {memory.free / 1e9:.1f} GB free on {device}"
    if memory.fits:
        examination.add("ok", "resources", "memory", message)
        return
    message += "; lower per_device_train_batch_size or max_length"
    message += "" if memory.checkpointing else ", or set gradient_checkpointing"
    if least or needed - (memory.margin or 0) > memory.free:
        examination.add("error", "resources", "memory", message)
    else:
        examination.add("warning", "resources", "memory", message)


def _examine_disk(disk: DiskNeed, examination: Examination) -> None:
    message = f"{disk.needed / 1e9:.2f} GB needed and {disk.free / 1e9:.1f} GB free"
    if disk.fits:
        examination.add("ok", "resources", "disk", message)
    else:
        examination.add("error", "resources", "disk", f"{message}; set save_total_limit, or another output_dir")
