"""What a process says when another one of the same run is gone."""

import re

import torch.distributed as dist

from plainlora.errors import UserError, first_line


def is_of_another_process(error: BaseException) -> bool:
    """Whether an error says that another process does not answer. Gloo's is a RuntimeError that names its file."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def lost_process(error: BaseException, kept: object, output_dir: object) -> UserError:
    """The error for the person who started the run.

    Args:
        error: The error of the communication.
        kept: The newest checkpoint, if there is one.
        output_dir: The run's folder.
    """
    rank, count = dist.get_rank(), dist.get_world_size()
    way = (
        f"{kept} is kept; resume with the same command and --resume_from_checkpoint true"
        if kept
        else f"{output_dir} holds no checkpoint yet; give the same command again"
    )
    said = re.sub(r"^\[\S*gloo\S*\] ", "", first_line(error)).partition(". ")[0][:120]
    return UserError(
        f"process {rank} of {count}: another process is gone ({said}), so training stopped; {way}; the launcher's "
        "report names the process that failed first"
    )
