"""Runs `recipes/sft.py` in a process of `accelerate launch`, and writes what the process held and sent.

    accelerate launch ... docs/several-devices/probe.py FOLDER --config ...

`FOLDER/RANK.json` gets bytes resident before the base was loaded, at most while it was loaded and wrapped, and at most
in the steps (`VmRSS` and `VmHWM` of `/proc/self/status`); and for each step the bytes sent and received, as the kernel
counted them on the process's connections (`TCP_INFO`). The program ends after training: nothing else is measured.
"""

import plainlora.quiet  # noqa: F401, I001

import json
import os
import runpy
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from plainlora.resources.memory import STATUS, _read_fields
from plainlora.run.run import Run
from plainlora.tasks import sft

TCP_INFO, SENT, RECEIVED = 11, 120, 128  # of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received, 8 bytes each
found: dict[str, Any] = {"sent": [], "received": []}


def resident(name: str) -> int:
    """A field of `/proc/self/status`, in bytes."""
    return _read_fields(STATUS)[name] * 1024


def begin_peak() -> None:
    """Sets `VmHWM` back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def traffic() -> tuple[int, int]:
    """Bytes sent and received so far on all TCP connections of this process."""
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # no socket, or closed meanwhile
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256)
                if len(info) >= RECEIVED + 8:
                    sent += struct.unpack_from("Q", info, SENT)[0]
                    received += struct.unpack_from("Q", info, RECEIVED)[0]
    return sent, received


class Watch(TrainerCallback):
    """Begins the peak with the first step, and counts the bytes of each."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Called when the model is wrapped."""
        found["loading"] = resident("VmHWM:")
        begin_peak()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Called before an optimizer step."""
        self.before = traffic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called after an optimizer step."""
        after = traffic()
        found["sent"].append(after[0] - self.before[0])
        found["received"].append(after[1] - self.before[1])


def main() -> None:
    """Runs the program with the measurements in place."""
    folder = Path(sys.argv.pop(1))
    load, make, train = sft.load_model, sft.make_trainer, Run.train

    def load_model(*args: Any) -> Any:
        found["before"] = resident("VmRSS:")
        return load(*args)

    def make_trainer(*args: Any) -> Any:
        trainer = make(*args)
        trainer.add_callback(Watch())
        return trainer

    def train_and_end(run: Run, trainer: Any) -> None:
        train(run, trainer)
        found["peak"] = resident("VmHWM:")
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        trainer.accelerator.wait_for_everyone()
        os._exit(0)

    sft.load_model, sft.make_trainer = load_model, make_trainer  # type: ignore[assignment]
    Run.train = train_and_end  # type: ignore[assignment,method-assign]
    sys.argv[0] = "recipes/sft.py"
    runpy.run_path("recipes/sft.py", run_name="__main__")


if __name__ == "__main__":
    main()
