"""A small part of tests/campaign.py, whose whole is docs/reliability.md."""

import shutil
import sys
from pathlib import Path

import pytest
from broken_images import break_images

import campaign
from cut_runs import KILLED, OUTPUTS, cut_runs, paired_runs
from fuzzed_calls import Call, Said, fuzz_calls, judged, make
from small_world import CALLS, build_world, words

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine may stand still for longer than a campaign has to wait for anything."""
    for bound in ("broken_images.SECONDS", "fuzzed_calls.SECONDS", "cut_runs.LONGEST"):
        monkeypatch.setattr(bound, 400)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("campaign") / "world")


def test_no_altered_byte_is_silent(tmp_path):
    told = []
    for target in campaign.build(tmp_path):
        counts = campaign.run(target, 40, told.append)
        assert counts.total() == 40
    assert not told


def test_broken_images_are_refused_or_shown():
    told = []
    counts = break_images(30, seed=1, tell=told.append)
    assert not told
    assert len(counts) > 7
    assert all(each["refused"] > 5 for each in counts.values())


@pytest.mark.parametrize("name", CALLS)
def test_what_is_fuzzed_works_as_it_is(name, world, monkeypatch, tmp_path):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    said = make(Call(name, words(name), None))
    assert judged(said) == "done", said


def test_no_call_ends_in_a_traceback_or_hangs(world):
    told = []
    counts = fuzz_calls(world, 30, seed=1, tell=told.append)
    assert not told
    assert sum(each.total() for each in counts.values()) == 30
    assert sum(each["refused"] for each in counts.values()) > 10


@pytest.mark.parametrize("name", KILLED)
def test_killed_runs_give_the_same_when_resumed(name, world):
    told = []
    counts = cut_runs(world, name, 1, seed=1, tell=told.append)
    assert not told
    assert counts["the same"] == 1


def test_of_two_processes_one_works(world):
    told = []
    names = [name for name in OUTPUTS if name != "demo"]
    counts = paired_runs(world, names, 1, seed=1, tell=told.append)
    assert not told
    assert [*counts] == names


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (Said(0, None, "fine", "", 1.0), "done"),
        (Said(2, None, "", "error: steps: 0 must be at least 1\n", 1.0), "refused"),
        (Said(2, None, "", "error: \n", 1.0), "not one error line"),
        (Said(2, None, "", 2 * "error: steps: 0 must be at least 1\n", 1.0), "not one error line"),
        (Said(2, None, "", "no", 1.0), "not one error line"),
        (Said(1, None, "", "error: steps: 0 must be at least 1\n", 1.0), "other exit code"),
        (Said(2, None, "", "error: steps: \x1b[31m must be at least 1\n", 1.0), "raw control character"),
        (Said(0, KeyError("x"), "", "", 1.0), "traceback"),
    ],
)
def test_how_calls_are_judged(said, outcome):
    assert judged(said) == outcome


def test_the_campaign_writes_its_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    marks = [mark.format(part="bytes") for mark in (campaign.BEGIN, campaign.END)]
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["campaign.py", "--part", "bytes", "--sample", "2", "--page", str(page)])
    assert campaign.main() == 0
    assert "| SAE | 2 | " in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert "old" not in page.read_text()
    real = PAGE.read_text()
    for part in campaign.PARTS:
        assert campaign.BEGIN.format(part=part) in real
        assert campaign.END.format(part=part) in real
