"""torchrun of the command line, as a person starts it, and what it says."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from command import ROOT


def bound_socket():
    """At a port of this machine that nobody else is given as long as it is there, and at which c10d may listen."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", 0))
    return bound


class Torchrun:
    """torchrun of the command line, in a process group of its own."""

    def __init__(self, arguments, n_ranks, log, launch=("--standalone",)):
        self.log = log
        launcher = [sys.executable, "-m", "torch.distributed.run", *launch, f"--nproc-per-node={n_ranks}"]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [*launcher, "-m", "saevlm_fast.cli", *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def ranks(self):
        """Process ids of the ranks, by /proc."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):  # it has ended meanwhile
                parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
                if int(parent) == self.process.pid:
                    entries = (process / "environ").read_text().split("\0")
                    found |= {int(entry[5:]): int(process.name) for entry in entries if entry.startswith("RANK=")}
        return found

    def wait_for(self, path, seconds=180):
        end = time.monotonic() + seconds
        while not list(path.glob("checkpoints/step_*")):
            assert time.monotonic() < end, self.said()
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)

    def end(self, seconds=180):
        code = self.process.wait(seconds)
        return code, self.said()

    def said(self):
        return self.log.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            for pid in (*self.ranks().values(), self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait()


def messages(said):
    """Lines of ours that say why the work ended; torchrun has a report of its own."""
    return [line for line in said.splitlines() if line.startswith(("error:", "another of", "interrupted"))]
