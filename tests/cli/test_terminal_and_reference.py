"""Progress, the page of settings, and shell completion."""

import io
import math
import os
import subprocess
import sys

import pytest

from command import ROOT, run
from saevlm_fast.cli import terminal
from saevlm_fast.cli.reference import reference
from saevlm_fast.cli.terminal import metric_text


@pytest.fixture
def lines(monkeypatch):
    """What is printed where there is no terminal."""
    text = io.StringIO()
    monkeypatch.setattr(terminal, "out", terminal._Console(file=text, markup=False, width=200))
    return text


def test_metrics_of_any_size_fit_a_table():
    assert [metric_text(value) for value in (0.12345, -3.0, 1.1e40, math.nan, math.inf)] == [
        "0.1235", "-3.0000", "1.100e+40", "nan", "inf",
    ]  # fmt: skip


def test_without_a_terminal_there_is_a_line_every_few_seconds_and_one_at_the_end(lines, monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
    with terminal.Bar("score", unit="images") as bar:
        for done in range(10, 110, 10):
            bar.update(done, 100, "2 skipped" if done > 40 else "")
    printed = lines.getvalue().splitlines()
    assert printed[-1] == "score 100/100 images  5.0 images/s  2 skipped"
    assert printed[0] == "score 30/100 images  5.0 images/s  14 s left"
    assert len(printed) == 4


def test_a_bar_that_does_not_speak(lines):
    for more in ({"speaks": False}, {"lines": False}):
        with terminal.Bar("verify", 10, "B", **more) as bar:
            bar.update(10)
    assert lines.getvalue() == ""


def test_a_list_goes_on_below_where_the_terminal_is_narrow(monkeypatch):
    items = [f"{number}: 0.{number:03} (1,234)" for number in range(1000, 1010)]
    for width, n_lines in ((60, 6), (200, 2)):
        text = io.StringIO()
        monkeypatch.setattr(terminal, "out", terminal._Console(file=text, markup=False, width=width))
        terminal.say_list("best latents (images it fires on)", items)
        printed = text.getvalue().splitlines()
        assert max(map(len, printed)) <= width
        assert len(printed) == n_lines
        assert printed[0].startswith("best latents (images it fires on)  1000: 0.1000 (1,234)")
        assert " ".join(text.getvalue().split()).endswith(" ".join(items)), "none is broken"
    terminal.say_list("none", [])
    assert text.getvalue().endswith("none\n")


def test_bars_of_names_are_seen_on_a_terminal_one_after_another(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "out", terminal._Console(file=shown, force_terminal=True, width=100))
    with terminal.Bars("encode ", "rows") as bars:
        for name in ("a", "b"):
            for done in (1, 2):
                bars.update(name, done, 2)
    assert shown.getvalue().index("encode a") < shown.getvalue().index("encode b")
    with terminal.Bars("encode ", "rows") as bars:  # one that never reaches its total
        for name, done in (("c", 1), ("d", 1), ("c", 2), ("d", 3)):
            bars.update(name, done, 3)
    assert shown.getvalue().index("encode c") < shown.getvalue().index("encode d")


def test_json_is_strict(capsys):
    terminal.print_json({"a": float("nan"), "b": (1, float("inf")), 0.05: "[bold]"})
    assert capsys.readouterr().out.split() == '{ "a": null, "b": [ 1, null ], "0.05": "[bold]" }'.split()


def test_the_page_of_settings_is_up_to_date():
    with open(os.path.join(ROOT, "docs", "settings.md"), encoding="utf-8") as page:
        assert page.read() == reference(), "python -m saevlm_fast.cli.reference > docs/settings.md"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # the shell above this process is anybody's
    assert "complet" in run("--show-completion", shell)


def test_completion_is_installed_and_completes(tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    program = "import sys; sys.argv[0] = 'saevlm-fast'; from saevlm_fast.cli import main; main()"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        [*command, "--install-completion", "bash"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "completion installed" in done.stdout
    words = {
        "_SAEVLM_FAST_COMPLETE": "complete_bash",
        "COMP_WORDS": "saevlm-fast train --architecture ",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment | words, capture_output=True, text=True)
    assert done.stdout.split() == ["topk", "batch_topk", "matryoshka", "relu", "jumprelu"], done.stderr
