"""The command line: options, config, call, print; one module a command. Input errors: one line, exit code 2."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from saevlm_fast.cli.options import app
from saevlm_fast.cli.ranks import speaks
from saevlm_fast.cli.terminal import doubts_once, err, out, refuse, shown
from saevlm_fast.cli.usage import run_app
from saevlm_fast.errors import Interrupted, first_line, full_disk, require
from saevlm_fast.training import beside

# Each makes itself a command of the app, in this order.
_COMMANDS = (
    *("synthetic", "harvest", "train", "demo", "ms_score", "evaluate", "top_images", "name", "report"),
    *("steer", "steering_score", "steerability", "erase", "cross_modal", "human_agreement"),
    *("inspect", "doctor", "convert", "push", "pull"),
)
for _name in _COMMANDS:
    import_module(f"saevlm_fast.cli.{_name}")


# Before torch is imported they let it round float32 in every product: NVIDIA's and Amazon's containers set them.
_ROUGHER = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE")


def main() -> None:
    """Entry point: input errors in one line and exit code 2, an interrupted run 130, never half a traceback."""
    # Before torch is imported: waiting threads that spin make a step several times slower on a machine that is shared
    # (docs/decisions.md), and 4 to 5 % faster at best on one that is not.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Weights and moments are walked from end to end: pages of 2 MiB spare the CPU lookups (docs/decisions.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for variable in _ROUGHER:
        os.environ.pop(variable, None)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        code = _code()
    except Exception as error:  # a fault of ours, which Python tells, and then waits for what hangs
        if not beside.hanging:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    _leave(code)


def _code() -> int:
    """The exit code of the command, once it is over and what it was refused for has been said."""
    try:
        screening = os.environ.get("SAEVLM_FAST_SCREENING", "")  # read by encoders, perhaps long after the start
        require(screening in ("", "0", "1"), f"SAEVLM_FAST_SCREENING: {screening!r} is neither 0 nor 1")
        with doubts_once():
            return run_app(app, "saevlm-fast")
    except RuntimeError as error:
        if "memory" not in str(error):  # torch says "can't allocate memory" or "out of memory"
            raise
        _refuse(first_line(error))
        return 2
    except (ValueError, OSError, MemoryError) as error:
        told = full_disk(error) if isinstance(error, OSError) else error
        _refuse(str(told) or type(error).__name__)  # a MemoryError has no words
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        if speaks():
            err.print(shown(str(error) or "interrupted"), style="yellow", highlight=False, soft_wrap=True)
        return 130


def _leave(code: int) -> NoReturn:
    """The end of the process, also where a logger hangs: its package may wait for it when Python ends, unless this is
    somebody's session, as by %run in a notebook."""
    # What the command has done is done: a Ctrl-C while Python ends would make 130 of its exit code. Not ignored at
    # once: a script that catches SystemExit goes on.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    if beside.hanging and not hasattr(sys, "ps1"):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # whoever read it is gone
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _refuse(text: str) -> None:
    """One line, also of many processes."""
    if speaks():
        refuse(text)


def _interrupt(number: int, frame: object) -> None:
    """Ctrl-C outside a training step. Not KeyboardInterrupt, which the command framework ends without a word."""
    raise Interrupted("interrupted")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options of the program itself."""
    if version:
        from saevlm_fast import __version__

        out.print(__version__, highlight=False)
        raise typer.Exit
