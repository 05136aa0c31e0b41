"""Runs `recipes/sft.py` in processes of `accelerate launch`, and writes what each process held and sent.

    accelerate launch ... docs/several-devices/probe.py CASES.json

`CASES.json` is a list of command lines of the program, each with a file to write to. Each is run in a process forked
from this one, which has loaded the libraries: that saves most of the time. `FILE.RANK` gets the bytes of each process

- held before the base was loaded, and at most in the steps after the first: resident (`VmRSS`, `VmHWM`), without the
  pages of mapped files (`RssFile`), but with those of the base's checkpoint where it is used as it lies there;
- sent and received in each step on its connections, as the kernel counted them (`TCP_INFO`).

The program ends after training.
"""

import plainlora.quiet  # noqa: F401, I001

import json
import os
import runpy
import socket
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from plainlora.errors import one_line_errors
from plainlora.run.run import Run
from plainlora.tasks import sft

TCP_INFO, SENT, RECEIVED = 11, 120, 128  # of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received, 8 bytes each


def resident(field: str) -> int:
    """A field of `/proc/self/status`, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def of_files() -> int:
    """Resident pages of mapped files other than checkpoints of weights, in bytes: of libraries, mostly."""
    weights, mapped = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            mapped = line.endswith(".safetensors")
        elif mapped and name in ("Rss:", "Anonymous:"):  # anonymous are pages that were written to, no file's any more
            weights += int(rest[0]) * 1024 * (1 if name == "Rss:" else -1)
    return resident("RssFile") - weights


def begin_peak() -> None:
    """Sets `VmHWM` back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def traffic() -> tuple[int, int]:
    """Bytes sent and received so far on the TCP connections of this process."""
    sent = received = 0
    for link in Path("/proc/self/fd").iterdir():
        if not link.is_socket():
            continue
        connection = socket.socket(fileno=os.dup(int(link.name)))
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256)
                sent += struct.unpack_from("Q", info, SENT)[0]
                received += struct.unpack_from("Q", info, RECEIVED)[0]
    return sent, received


class Watch(TrainerCallback):
    """Begins the peak after the first step, whose checks hold and send more, and counts the bytes of each step."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Called before an optimizer step."""
        if state.global_step == 1:
            self.found["first"] = resident("VmHWM") - of_files()
            begin_peak()
        self.before = traffic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called after an optimizer step."""
        self.found["peak"] = resident("VmHWM") - of_files()
        for name, after, before in zip(("sent", "received"), traffic(), self.before, strict=True):
            self.found[name].append(after - before)


def measure(words: list[str], file: str) -> None:
    """Runs the program with the measurements in place."""
    found: dict[str, Any] = {"sent": [], "received": []}
    load, make, train = sft.load_model, sft.make_trainer, Run.train

    def load_model(*args: Any) -> Any:
        found["before"] = resident("VmRSS") - of_files()
        return load(*args)

    def make_trainer(*args: Any) -> Any:
        trainer = make(*args)
        trainer.add_callback(Watch(found))
        return trainer

    def train_and_end(run: Run, trainer: Any) -> None:
        train(run, trainer)
        Path(f"{file}.{os.environ['RANK']}").write_text(json.dumps(found), encoding="utf-8")
        trainer.accelerator.wait_for_everyone()
        os._exit(0)

    sft.load_model, sft.make_trainer = load_model, make_trainer  # type: ignore[assignment]
    Run.train = train_and_end  # type: ignore[assignment,method-assign]
    sys.argv = ["recipes/sft.py", *words]
    with one_line_errors():
        runpy.run_path("recipes/sft.py", run_name="__main__")


def main() -> None:
    """Runs the cases one after the other."""
    for number, (words, file) in enumerate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        child = os.fork()
        if not child:
            # Each case meets in a store of its own: the launcher's still has the addresses of the case before.
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1 + number)
            try:
                measure(words, file)
            except BaseException:  # whatever ends it ends this process alone
                traceback.print_exc()
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{' '.join(words)}: failed")
        # A process that is ahead must not find the others' of the case before.
        Path(f"{file}.{os.environ['RANK']}.ended").touch()
        while not all(Path(f"{file}.{rank}.ended").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
            time.sleep(0.1)


if __name__ == "__main__":
    main()
