"""Locks that another process holds: those of this process do not stop it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLDS = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX if sys.argv[2] == "exclusive" else fcntl.LOCK_SH)
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def held(lock: Path, kind: str) -> Iterator[None]:
    """kind: exclusive or shared."""
    holder = subprocess.Popen([sys.executable, "-c", _HOLDS, str(lock), kind], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield
    finally:
        holder.kill()
        holder.communicate()
