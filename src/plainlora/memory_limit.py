"""An end to what was written elsewhere and may take all memory: a chat template that repeats a letter, for one."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

if sys.platform == "linux":
    import resource


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Raises `MemoryError` where the block, or a thread beside it, allocates more than this many bytes.

    It takes microseconds. It needs Linux and the main thread, so that no two limits overlap; elsewhere the block runs
    without a limit.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return
    with open("/proc/self/statm", encoding="ascii") as stream:
        used = int(stream.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = min(limit for limit in (used + size, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"it takes more than {size / 2**20:,.0f} MiB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
