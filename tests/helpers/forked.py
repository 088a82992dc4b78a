"""The command in a process of its own that has torch and all at once: a fork of this one."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from saevlm_fast.cli import main


class Forked(multiprocessing.get_context("fork").Process):
    """`saevlm-fast ARGUMENTS`; what it says, on stdout and stderr, is in the file `log`."""

    def __init__(self, arguments: Sequence[object], log: Path, environment: Mapping[str, object] | None = None):
        super().__init__()
        self.arguments, self.log = ["saevlm-fast", *map(str, arguments)], log
        self.environment = {name: str(value) for name, value in (environment or {}).items()}

    def run(self):
        os.environ.update(self.environment)
        with open(self.log, "w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            sys.argv = self.arguments
            main()

    def interrupt(self):
        os.kill(self.pid, signal.SIGINT)

    def end(self, seconds: float = 120) -> tuple[int | None, str]:
        """Waits: its exit code (None: it goes on still) and what it has said."""
        self.join(seconds)
        return self.exitcode, self.log.read_text()
