"""Whether memory and disk are enough, as `plainlora.resources.footprint` counts what a run needs."""

from plainlora.doctor.finding import Examination
from plainlora.resources.footprint import Footprint

LEEWAY = 1.15  # the estimate is held to 15 % of a measured peak


def examine_resources(footprint: Footprint, examination: Examination) -> None:
    """Says whether the run fits; how much of what it needs stands in the footprint's own table."""
    device, free = footprint.device, footprint.free
    if footprint.peak is None or free is None:
        examination.add("note", "resources", "memory", f"what a step needs on {device} could not be counted")
    else:
        needed = footprint.peak - footprint.libraries - footprint.mapped
        said = f"{needed / 1e9:.1f} GB needed and {free / 1e9:.1f} GB free on {device}"
        if needed <= free:
            examination.add("ok", "resources", "memory", said)
        else:
            smaller = "lower per_device_train_batch_size or max_length" + (
                "" if footprint.checkpointing else ", or set gradient_checkpointing"
            )
            level = "error" if needed > LEEWAY * free else "warning"
            examination.add(level, "resources", "memory", f"{said}; {smaller}")  # type: ignore[arg-type]
    said = f"{footprint.disk_needed / 1e9:.2f} GB needed and {footprint.disk_free / 1e9:.1f} GB free"
    if footprint.disk_fits:
        examination.add("ok", "resources", "disk", said)
    else:
        examination.add("error", "resources", "disk", f"{said}; set save_total_limit, or another output_dir")
