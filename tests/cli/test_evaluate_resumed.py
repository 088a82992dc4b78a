"""saevlm-fast evaluate: what is finished of one that was cut short, and how it goes on."""

import json
import shlex
import tomllib

import pytest
from evaluations import make_inputs, words

from command import run
from saevlm_fast.errors import Interrupted
from saevlm_fast.inspection import inspect
from saevlm_fast.measures import kinds, measure, parts


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("evaluate"))


def test_it_goes_on_where_it_was(there, tmp_path, monkeypatch):
    output = tmp_path / "out"
    ran = []
    original = kinds.work

    def counting(name, inputs, subject, codes):
        if len(ran) == 3:
            raise Interrupted("interrupted")
        ran.append((subject.name, name))
        return original(name, inputs, subject, codes)

    monkeypatch.setattr(kinds, "work", counting)
    told = run(*words(there, output, saes=2), code=130)
    settings = output / "settings.toml"
    assert f"interrupted; continue with: saevlm-fast evaluate --config {settings} --resume" in told.replace("\n", "")
    assert not (output / "evaluation.json").exists()
    assert "already holds an evaluation; use --resume" in run(*words(there, output, saes=2), code=2)
    monkeypatch.undo()
    monkeypatch.setattr(kinds, "work", lambda *each: ran.append((each[2].name, each[0])) or original(*each))
    first = tomllib.loads(settings.read_text())["made"]
    again = ("evaluate", "--config", settings, "--resume")
    run(*again)  # as it was told
    made = tomllib.loads(settings.read_text())["made"]
    resumed = shlex.join(["saevlm-fast", *map(str, again)])
    assert (made["command_line"], made["directory"], made["began"]) == tuple(
        first[name] for name in ("command_line", "directory", "at")
    )
    assert made["calls"] == [first["command_line"], resumed]
    text = " ".join(run("inspect", output).split())
    assert f"as {first['command_line']}" in text
    assert f"and {resumed}" in text
    assert len(ran) == len(set(ran)), "nothing is made twice"
    ran.clear()
    run(*words(there, output, "--resume", saes=3))
    assert {name for name, _ in ran} == {"sae2"}, "an SAE more"
    made = tomllib.loads(settings.read_text())["made"]
    assert made["command_line"] == made["calls"][2], "the first call would not measure it"
    assert (made["calls"][:2], made["began"]) == ([first["command_line"], resumed], made["at"])
    monkeypatch.undo()
    run(*words(there, tmp_path / "unbroken", saes=3))
    both = [json.loads((path / "evaluation.json").read_text()) for path in (output, tmp_path / "unbroken")]
    assert both[0]["subjects"] == both[1]["subjects"]
    assert both[0]["table"] == both[1]["table"]


def test_under_force_it_says_what_to_type(there, tmp_path, monkeypatch):
    """Also where there was nothing to replace; what replaces goes on where it was, and the old stays until then."""
    output, original = tmp_path / "out", kinds.work

    def interrupted(name, *more):
        if name == "geometry":
            raise Interrupted("interrupted")
        return original(name, *more)

    for place in (output, output / ".replacement"):
        monkeypatch.setattr(kinds, "work", interrupted)
        told = run(*words(there, output, "--force", "--labels", "none"), code=130).replace("\n", "")
        again = f"saevlm-fast evaluate --config {place / 'settings.toml'} --resume"
        assert told.endswith(f"interrupted; continue with: {again}")
        assert (output / "evaluation.json").is_file() == (place != output)
        same = run(*words(there, output, "--resume", "--labels", "none"), code=130).replace("\n", "")
        assert same.endswith("interrupted; continue with the same command")
        monkeypatch.undo()
        run(*again.split()[1:])
        assert (output / "evaluation.json").is_file()
    assert not (output / ".replacement").exists()


def test_inspect_says_how_far_a_cut_evaluation_came_and_how_it_goes_on(there, tmp_path, monkeypatch):
    """Also where it was moved, where it is to replace another, and where a kill has left no settings."""
    output, original = tmp_path / "out", kinds.work

    def interrupted(name, *more):
        if name == "geometry":
            raise Interrupted("interrupted")
        return original(name, *more)

    def cut(*more):
        with monkeypatch.context() as patch:
            patch.setattr(kinds, "work", interrupted)
            run(*words(there, output, *more), code=130)

    cut()
    found = inspect(output)
    assert (found["kind"], found["command"], found["complete"]) == ("result", "evaluate", False)
    finished = [file.stem for file in sorted((output / "parts" / "sae0").glob("*.json"))]
    assert found["finished"] == {"sae0": finished}
    assert {"reconstruction", "uniqueness"} <= set(finished)
    assert "geometry" not in finished
    text = " ".join(run("inspect", output, "--verify").split())
    for word in ("finished: sae0 ", ", ".join(finished), "saevlm-fast evaluate", "can be read", "INCOMPLETE"):
        assert word in text, word
    assert f"{len(finished)} measures are finished; continue with {found['way_on']}" in text
    folder = inspect(tmp_path)
    assert [item["way_on"] for item in folder["contents"]] == [found["way_on"]]
    assert "INCOMPLETE" in run("inspect", tmp_path)
    moved = output.rename(tmp_path / "moved")
    (moved / "settings.toml").rename(tmp_path / "settings.toml")
    without = run("inspect", moved)
    assert "the same command and --resume" in without
    assert "no settings lie beside it" in without
    (tmp_path / "settings.toml").rename(moved / "settings.toml")
    way_on = inspect(moved)["way_on"]
    assert f"--output {moved} --resume" in way_on
    run(*way_on.split()[1:])
    assert inspect(moved)["figures"]["saes"] == ["sae0"]
    moved.rename(output)
    cut("--force")
    found = inspect(output)
    assert found["figures"]["saes"] == ["sae0"]
    assert found["replacement"]["finished"] == {"sae0": finished}
    assert "its replacement" in run("inspect", output)
    run(*found["replacement"]["way_on"].split()[1:])
    assert "replacement" not in inspect(output)


def test_a_killed_evaluation_has_its_settings_from_the_first_finished_part_on(there, tmp_path, monkeypatch):
    output, original = tmp_path / "out", kinds.work

    class Killed(BaseException):
        """Which nothing catches, as nothing hears a kill -9."""

    def killed(*given):
        if list(output.rglob("parts/*/*.json")):
            raise Killed
        return original(*given)

    monkeypatch.setattr(kinds, "work", killed)
    with pytest.raises(Killed):
        run(*words(there, output))
    assert not (output / "evaluation.json").exists()
    found = inspect(output)
    assert len(found["finished"]["sae0"]) >= 1
    assert found["made"]["command_line"].startswith("saevlm-fast evaluate")
    assert f"--config {output / 'settings.toml'}" in found["way_on"]
    before = tomllib.loads((output / "settings.toml").read_text())
    monkeypatch.undo()
    run(*found["way_on"].split()[1:])
    made = tomllib.loads((output / "settings.toml").read_text())["made"]
    assert (made["command_line"], made["began"]) == (before["made"]["command_line"], before["made"]["at"])
    assert inspect(output)["figures"]["saes"] == ["sae0"]


def test_a_folder_of_others_with_parts_is_no_evaluation(tmp_path):
    (tmp_path / "parts" / "engine").mkdir(parents=True)
    (tmp_path / "parts" / "engine" / "piston.json").write_text('{"version": 1, "key": "a"}')
    assert "nothing to inspect in it" in run("inspect", tmp_path, code=2)


def test_it_says_so_where_what_is_finished_is_of_an_earlier_version(there, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(parts, "PARTS_VERSION", 4)
        run(*words(there, output))
    said = " ".join(run(*words(there, output, "--resume")).split())
    assert (
        said.count(f"{output}: what is finished there is of another version of this program (parts of version 4") == 1
    )
    assert "it is made anew" in said
    assert "another version" not in run(*words(there, output, "--resume")), "it is of this one now"
    monkeypatch.setattr(measure, "weights_digest", lambda sae: "another")
    assert "another version" not in run(*words(there, output, "--resume")), "of another SAE, but of this version"


def test_a_damaged_part_is_made_anew(there, tmp_path):
    output = tmp_path / "out"
    run(*words(there, output))
    (output / "mine.txt").write_text("mine")
    before = json.loads((output / "evaluation.json").read_text())
    parts = output / "parts" / "sae0"
    (parts / "uniqueness.json").write_text("{")
    (parts / "geometry.latents.parquet").write_bytes(b"PAR1")
    run(*words(there, output, "--resume"))
    assert json.loads((output / "evaluation.json").read_text()) == before
    run(*words(there, output, "--force", "--labels", "none"))
    assert "labels" not in json.loads((output / "evaluation.json").read_text())["subjects"][0]["measures"]
    assert (output / "mine.txt").read_text() == "mine"
    assert not (output / ".replacement").exists()
