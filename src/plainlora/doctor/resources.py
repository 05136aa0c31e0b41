"""Checks that memory and disk space suffice, by the estimate of `plainlora.resources.footprint`."""

from plainlora.doctor.finding import Examination, Level
from plainlora.resources.disk import DiskNeed
from plainlora.resources.engines import DevicesNeed
from plainlora.resources.footprint import Footprint
from plainlora.resources.peak import MemoryNeed


def examine_resources(footprint: Footprint, examination: Examination) -> None:
    """Checks that the run fits into memory, here or on the devices that it is planned for, and on the disk.

    It is an error if the live bytes do not fit into memory, and a warning if only the margin does not.

    Args:
        footprint: The estimate.
        examination: Gets the findings.
    """
    if footprint.devices is None:
        _examine_memory(footprint.memory, footprint.device, examination)
        _examine_disk(footprint.disk, examination)
    else:
        _examine_devices(footprint.devices, examination)
        examination.add("note", "resources", "disk", f"{footprint.disk.needed / 1e9:.2f} GB needed")


def _examine_memory(memory: MemoryNeed, device: str, examination: Examination) -> None:
    if memory.free is None and memory.needed is not None:
        message = f"{memory.needed / 1e9:.1f} GB needed; how much is free on {device} is not known"
        examination.add("note", "resources", "memory", message)
        return
    if memory.fits is None or memory.free is None:
        least = f"the run needs at least {memory.at_least / 1e9:.1f} GB"
        message = f"the memory of a step on {device} could not be counted; {least}"
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


def _examine_devices(need: DevicesNeed, examination: Examination) -> None:
    where = f"{need.devices} x {need.memory / 1e9:g} GB"
    known = [engine for engine in need.engines if engine.total is not None]
    if not known:
        examination.add("note", "resources", "devices", f"the memory of a step on {where} could not be counted")
    elif need.choice is not None:
        chosen = next(engine for engine in known if engine.config == need.choice)
        message = f"{where}: choose accelerate_configs/{need.choice} ({chosen.engine}), with"
        examination.add("ok", "resources", "devices", f"{message} {(chosen.total or 0) / 1e9:.1f} GB on each")
    else:
        least = min(known, key=lambda engine: engine.total or 0)
        message = f"{where}: no engine fits; the least is {(least.total or 0) / 1e9:.1f} GB on each, with"
        message += f" accelerate_configs/{least.config}; take more devices, load_in_4bit, or a lower"
        message += " per_device_train_batch_size or max_length"
        level: Level = "warning" if any(engine.fits_closely for engine in known) else "error"
        examination.add(level, "resources", "devices", message)


def _examine_disk(disk: DiskNeed, examination: Examination) -> None:
    message = f"{disk.needed / 1e9:.2f} GB needed and {disk.free / 1e9:.1f} GB free"
    if disk.fits:
        examination.add("ok", "resources", "disk", message)
    else:
        examination.add("error", "resources", "disk", f"{message}; set save_total_limit, or another output_dir")
