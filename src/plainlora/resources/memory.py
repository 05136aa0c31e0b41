"""The peak memory of a run, and the memory that is free."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Resets a GPU's peak to what is allocated now, for `peak_memory`.

    On a CPU the peak counts from the start of the process. Linux can reset `VmHWM` (write 5 to
    `/proc/self/clear_refs`), but that also resets the figure of other programs that watch this process, such as
    `/usr/bin/time`.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """The peak memory of the process that held most. To be called in every process.

    Args:
        device: The device of this process.

    Returns:
        `peak_memory_bytes`: on a GPU the most allocated since `reset_peak_memory`, on a CPU the most resident since
        the process began. On a GPU also `peak_memory_reserved_bytes`: the most that PyTorch reserved on the device.
    """
    if device.type == "cuda":
        peaks = {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_memory_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    else:
        peaks = {"peak_memory_bytes": _peak_resident_memory()}
    everywhere = gather_object([peaks])
    return {name: max(each[name] for each in everywhere) for name in peaks}


def _peak_resident_memory() -> int:
    if STATUS.is_file():  # getrusage would include the peak of the parent process
        return _read_fields(STATUS)["VmHWM:"] * 1024
    if sys.platform == "win32":
        import psutil  # noqa: PLC0415  # PEFT and Accelerate depend on it

        return psutil.Process().memory_info().peak_wset
    import resource  # noqa: PLC0415  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Resident bytes of this process; its peak if they are unknown."""
    return _read_fields(STATUS)["VmRSS:"] * 1024 if STATUS.is_file() else _peak_resident_memory()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; `None` if that is unknown.

    On a CPU under Linux: the kernel's `MemAvailable`, or less if a control group allows less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not Path("/proc/meminfo").is_file():
        return None
    return min([_read_fields(Path("/proc/meminfo"))["MemAvailable:"] * 1024, *_left_to_cgroups()])


def of_this_process(free: int | None, device: torch.device) -> int | None:
    """One process's share of a device's free bytes: all processes share a CPU's memory, a GPU has one process."""
    return None if free is None else free // PartialState().num_processes if device.type == "cpu" else free


def _read_fields(path: Path) -> dict[str, int]:
    """The fields of a file whose lines are a name and a number."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: int(number) for name, number, *_ in (line for line in lines if len(line) > 1) if number.isdigit()}


def _left_to_cgroups() -> list[int]:
    """Bytes left in this process's control group and in each of its parents."""
    left = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):  # v2, v1
            root = Path("/sys/fs/cgroup") / controllers
            folder = root / group.lstrip("/")
            left += [left_to_cgroup(each) for each in (folder, *folder.parents) if each.is_relative_to(root)]
    return [each for each in left if each is not None]


def left_to_cgroup(folder: Path) -> int | None:
    """Bytes that a control group may still use; `None` without a limit. Inactive file pages count as free.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html

    Args:
        folder: The group's folder, of version 2 or version 1.
    """
    for limit, used, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).is_file():
            allowed = (folder / limit).read_text(encoding="ascii").strip()
            files = _read_fields(folder / "memory.stat").get(idle, 0)
            return None if allowed == "max" else int(allowed) - int((folder / used).read_text("ascii")) + files
    return None
