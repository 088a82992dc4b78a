"""The command `saevlm-fast` as tests call it."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest

from saevlm_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, code=0):
    """The command in this process (importing torch anew costs seconds): exit code checked, stdout + stderr returned."""
    captured = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(captured),
        contextlib.redirect_stderr(captured),
    ):
        patch.setattr(sys, "argv", ["saevlm-fast", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
            exit_code = 0
        except SystemExit as end:
            exit_code = end.code or 0
    text = captured.getvalue()
    assert exit_code == code, text
    assert "Traceback" not in text
    return text


def run_json(*arguments):
    """What --json prints: one object on stdout, and nothing else there."""
    stdout = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        patch.setattr(sys, "argv", ["saevlm-fast", *map(str, arguments), "--json"])
        with contextlib.suppress(SystemExit):
            main()
    return json.loads(stdout.getvalue())


def files_below(directory):
    """Every file and directory, and the bytes of files: what a dry run must leave as it is."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(directory).rglob("*")}
