"""What commands write: `inspect` says what each is, and every `--json` has one name for a quantity."""

import builtins
import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from command import run, run_json
from saevlm_fast import files
from saevlm_fast.inspection import inspect, verify_inspected
from saevlm_fast.results import found as results
from saevlm_fast.results.made import misfit_of
from small_world import CALLS, build_world, words

# Of a command, what its output is called here, and what its figures must hold, by its own --json.
RESULTS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "ms-score": ("scores.parquet", lambda said: {name: said[name] for name in ("images", "mean", "above_null")}),
    "evaluate": (
        "evaluation",
        lambda said: {
            "saes": ["run"],
            "controls": ["raw"],
            "headlines": {row["measure"]: {"run": row["values"]["run"]} for row in said["table"]},
        },
    ),
    "report": ("report", lambda said: {name: said[name] for name in ("latents", "images")}),
    "top-images": ("tops", lambda said: {"latents": said["latents"]}),
    "name": ("names.csv", lambda said: {name: said[name] for name in ("latents", "named")}),
    "steering-score": ("steering.json", lambda said: {name: said[name] for name in ("latents", "conditions")}),
    "steerability": (
        "steerability.parquet",
        lambda said: {name: said["of_latents"][name] for name in ("units", "asked", "dead", "s")},
    ),
    "erase": ("erased.json", lambda said: {"what": said["what"]}),
    "cross-modal": (
        "crossed",
        lambda said: {name: said[name] for name in ("pairs", "kept", "latents", "latent_kinds")},
    ),
    "human-agreement": ("agreement.json", lambda said: {name: said[name] for name in ("pairs", "neurons")}),
}
# Of a table that is a part of a result: the command, and what its figures must hold, by the --json or the main file.
PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "erased.csv": ("erase", lambda inspected: {"layers": inspected["figures"]["layers"]}),
    "grid/grid.json": ("train", lambda said: {"rows": 12, "saes": _headlines_of_grid(said)}),
    "grid/grid.parquet": ("train", lambda said: {"saes": _headlines_of_grid(said)}),
    "moved.neurons.csv": ("steerability", lambda said: {"units": 128, "s": said["of_neurons"]["s"]}),
    "crossed/latents.parquet": ("cross-modal", lambda said: {"scored": said["latent_kinds"]["scored"]}),
    "crossed/samples.parquet": ("cross-modal", lambda said: {name: said[name] for name in ("pairs", "kept")}),
    "crossed/patches.parquet": ("cross-modal", lambda said: {"pairs": said["pairs"], "image_tokens": 6 * 36}),
    "evaluation/latents/run.parquet": ("evaluate", lambda said: {"counts": {"defined": 5, "dead": 11}}),
    "evaluation/pairs/run.parquet": ("evaluate", lambda said: {}),
}
NO_RESULTS = ("parts", "checkpoints", "d16", "d32", "harvest.json", "run.json", "cfg.json")
# Their keys are made elsewhere, or are the titles of a table's rows.
OTHERS_MAKE_THE_KEYS = ("source", "record", "facts", "metadata", "settings", "made", "headlines")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("results") / "world")


@pytest.fixture(scope="module")
def printed(world):
    """What every command gives as JSON, in a dry run and at work; "inspect" of every output among it."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        for name, call in CALLS.items():
            output = RESULTS[name][0] if name in RESULTS else f"made-{name}"
            changes = {"output": output} if "--output" in call else {}
            if "--dry-run" not in call and name not in ("inspect", "doctor"):
                found[f"{name}, planned"] = run_json(*words(name, **changes), "--dry-run")
            found[name] = run_json(*words(name, **changes))
        grid = ("--activations", "store", "--d-sae", "16,32", "--k", 2, "--steps", 3, "--batch-size", 16)
        found["grid"] = run_json("train", *grid, "--device", "cpu", "--output", "grid")
        asked = [each for each in words("steerability", output="moved.csv") if each != "--no-neurons"]
        found["neurons"] = run_json(*asked)
        for output in (*(output for output, _ in RESULTS.values()), *PARTS):
            found[f"inspect {output}"] = run_json("inspect", output)
    return found


@pytest.mark.parametrize("command", RESULTS)
def test_inspect_says_what_a_result_is(command, world, printed):
    output, expected = RESULTS[command]
    found = inspect(world / output)
    assert (found["kind"], found["command"]) == ("result", command)
    for name, value in expected(printed[command]).items():
        assert found["figures"][name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert found["made"]["versions"]["saevlm-fast"]
    text = " ".join(run("inspect", world / output, "--verify").split())
    for word in (f"made by saevlm-fast {command} 0.", found["made"]["at"], found["what"], "can be read"):
        assert word in text, word
    said = [name for name in ("sae", "benchmark") if name in found["settings"]]
    assert said
    assert f"given: {said[0]}" in text
    assert json.dumps(found, allow_nan=False)


def _headlines_of_grid(said: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: {name: each[name] for name in ("explained_variance", "l0")} for each in said["saes"]}


@pytest.mark.parametrize("part", PARTS)
def test_inspect_says_what_a_part_of_a_result_is(part, world, printed):
    command, expected = PARTS[part]
    said = {"grid": "grid", "moved": "neurons", "erased": "inspect erased.json"}
    found = inspect(world / part)
    assert (found["kind"], found["command"], found["made"]["command_line"].split()[1]) == ("result", command, command)
    for name, value in expected(printed[said.get(re.split("[./]", part)[0], command)]).items():
        assert found["figures"][name] == (pytest.approx(value) if isinstance(value, float) else value), name
    text = " ".join(run("inspect", world / part, "--verify").split())
    assert f"made by saevlm-fast {command} 0." in text
    assert found["what"] in text


def test_inspect_knows_every_table_and_record_that_a_result_is_made_of(world, printed):
    of_results = [world / output for output, _ in RESULTS.values()] + [world / "grid", *world.glob("*.neurons.csv")]
    files = [file for path in of_results for file in (path.rglob("*") if path.is_dir() else [path])]
    tables = [str(file.relative_to(world)) for file in files if file.suffix in (".parquet", ".csv", ".json")]
    asked = [file for file in tables if not set(NO_RESULTS) & set(Path(file).parts)]
    assert {"grid/grid.parquet", "crossed/samples.parquet", "moved.neurons.csv", "erased.json"} <= set(asked)
    assert {file: inspect(world / file)["kind"] for file in asked} == dict.fromkeys(asked, "result")


def test_a_part_far_from_its_settings_is_described_without(world, printed, tmp_path):
    shutil.copy(world / "erased.csv", tmp_path / "erased.csv")
    shutil.copy(world / "scores.parquet.settings.toml", tmp_path / "erased.json.settings.toml")
    found = inspect(tmp_path / "erased.csv")
    assert (found["command"], found["made"]) == ("erase", {})


@pytest.mark.parametrize("document", ['{"a": [1]}', '{"subjects": [], "table": [], "left_out": []}', "{"])
@pytest.mark.parametrize("with_settings", [False, True])
def test_json_is_read_once(document, with_settings, world, printed, tmp_path):
    (tmp_path / "mine.json").write_text(document)
    if with_settings:
        shutil.copy(world / "agreement.json.settings.toml", tmp_path / "mine.json.settings.toml")
    with _opened("mine.json") as opened, contextlib.suppress(ValueError):
        inspect(tmp_path / "mine.json")
    assert len(opened) == 1
    if with_settings:
        with _opened("mine.json") as opened:
            inspect(tmp_path)
        assert len(opened) == 1


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_what_a_command_wrote_is_read_once_but_for_a_tables_columns(suffix, world, printed, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    run(*words("ms-score", output=str(tmp_path / f"made{suffix}")))
    with _opened(f"made{suffix}") as opened:
        inspect(tmp_path / f"made{suffix}")
    assert len(opened) == (1 if suffix == ".json" else 0)  # Arrow opens tables by itself


def test_json_that_is_too_large_is_told_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "LARGEST", 1000)
    (tmp_path / "mine.json").write_text(json.dumps({"a": "b" * 1000}))
    with _opened("mine.json") as opened:
        text = run("inspect", tmp_path / "mine.json", code=2)
    assert "1.0 kB of JSON; at most 1.0 kB are read" in text
    assert opened == []


@contextlib.contextmanager
def _opened(name: str) -> Iterator[list[str]]:
    """The files of a name that Python opens in the block."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        real = io.open

        def counted(file: Any, *arguments: Any, **more: Any) -> Any:
            found.extend([str(file)] if str(file).endswith(name) else [])
            return real(file, *arguments, **more)

        patch.setattr(io, "open", counted)
        patch.setattr(builtins, "open", counted)
        yield found


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_scores_of_every_suffix_are_the_same_without_their_settings(suffix, world, printed, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    run(*words("ms-score", output=str(tmp_path / f"made{suffix}")))
    shutil.move(tmp_path / f"made{suffix}", tmp_path / f"moved{suffix}")
    found = inspect(tmp_path / f"moved{suffix}")
    assert found["figures"]["mean"] == pytest.approx(printed["ms-score"]["mean"])
    assert found["figures"]["counts"] == {k: v for k, v in printed["ms-score"]["counts"].items() if v}
    assert found["figures"]["best_latents"][0]["latent"] == printed["ms-score"]["best_latents"][0]["latent"]
    assert found["made"] == {}
    assert found["metadata"].get("sae") == (None if suffix == ".csv" else "run")
    assert "no settings lie beside it" in run("inspect", tmp_path / f"moved{suffix}")


@pytest.mark.parametrize("command", [*RESULTS, "harvest", "train"])
def test_settings_make_the_same_from_another_directory(command, world, printed, tmp_path, monkeypatch):
    """All that they name is opened."""
    result = world / RESULTS[command][0] if command in RESULTS else world / f"made-{command}"
    settings = result / "settings.toml" if result.is_dir() else result.with_name(f"{result.name}.settings.toml")
    monkeypatch.chdir(tmp_path)
    first = printed[f"{command}, planned"]
    again = run_json(command, "--output", f"again{result.suffix}", "--config", settings, "--dry-run")
    assert again["dry_run"]
    assert {name: again[name] for name in ("images", "rows", "latents") if name in again} == {
        name: first[name] for name in ("images", "rows", "latents") if name in first
    }


def test_a_folder_lists_results(world, printed):
    found = {Path(item["path"]).name: item.get("command") for item in inspect(world)["contents"]}
    assert {output: command for command, (output, _) in RESULTS.items()}.items() <= found.items()
    assert "settings.toml" not in str(found)


def test_a_picture_is_known_by_its_settings(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    run(*words("top-images", output=str(tmp_path / "tops.png")))
    found = inspect(tmp_path / "tops.png")
    assert (found["command"], found["figures"]) == ("top-images", {"images": 12, "latents": 4})
    (tmp_path / "tops.png.settings.toml").unlink()
    assert "neither store, SAE, run, matrix nor result" in run("inspect", tmp_path / "tops.png", code=2)


def test_settings_of_another_command_are_not_taken_for_a_results(world, printed, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.copy(world / "scores.parquet", tmp_path / "run" / "scores.parquet")
    found = inspect(tmp_path / "run" / "scores.parquet")
    assert (found["command"], found["made"], found["settings"]) == ("ms-score", {}, {})


def test_settings_that_do_not_fit_a_table_are_not_told_as_its_own(world, printed, tmp_path):
    """Its table was replaced by another's, without its settings."""
    shutil.copy(world / "scores.parquet", tmp_path / "scores.parquet")
    settings = (world / "scores.parquet.settings.toml").read_text()
    (tmp_path / "scores.parquet.settings.toml").write_text(settings)
    assert "misfit" not in inspect(tmp_path / "scores.parquet")
    assert f'sae = "{world / "run"}"' in settings
    other = settings.replace(f'sae = "{world / "run"}"', f'sae = "{world / "language"}"')
    (tmp_path / "scores.parquet.settings.toml").write_text(other)
    found = inspect(tmp_path / "scores.parquet")
    assert (found["command"], found["made"], found["settings"]) == ("ms-score", {}, {})
    assert found["misfit"] == f"sae is run in it, and {world / 'language'} in settings.toml"
    text = " ".join(run("inspect", tmp_path / "scores.parquet").split())
    assert "the settings beside it are of another: sae is run in it" in text
    assert "given: sae run" in text, "as the table says"


@pytest.mark.parametrize("sae", ["../run", "../a, b/run"])
def test_settings_are_a_results_own_wherever_what_it_was_made_of_lies(sae, world, tmp_path, monkeypatch):
    """With `..`, and commas in a name, also in one of a list."""
    for name, source in (("run", "run"), ("a, b/run", "run"), ("a, b/e", "embeddings"), ("e", "embeddings")):
        shutil.copytree(world / source, tmp_path / name, dirs_exist_ok=True)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    call = [each for each in words("ms-score", output="s.parquet", sae=sae, activations=str(world / "store"))]
    for embeddings in ("../e", "../a, b/e"):
        call[call.index("--embeddings") + 1] = embeddings
        run(*call, "--force")
        found = inspect(Path("s.parquet"))
        assert ("misfit" in found, found["settings"]["sae"]) == (False, f"{tmp_path}/sub/{sae}")


def test_the_names_of_a_table_are_compared_with_a_list_one_by_one():
    settings = {"embeddings": ["/w/sub/../a, b", "/w/c", "hf:me/d"]}
    made = {"directory": "/w/sub"}
    for said in ("../a, b, ../c, hf:me/d", "/w/a, b,/w/c,hf:me/d"):
        assert misfit_of({"embeddings": said}, settings, made) is None
    for said in ("../a, b, ../c", "../a, ../c, hf:me/d", "../a, b, ../c, hf:me/d, e", "../a, b, hf:me/d, ../c", ""):
        found = misfit_of({"embeddings": said}, settings, made)
        assert found == f"embeddings is {said} in it, and /w/sub/../a, b, /w/c, hf:me/d in settings.toml"


def test_tables_of_others_that_say_what_saes_they_are_of_are_theirs(tmp_path):
    (tmp_path / "mine.csv").write_text("name,architecture,d_sae,l0\na,topk,16,2\n")
    assert "neither store, SAE, run, matrix nor result" in run("inspect", tmp_path / "mine.csv", code=2)


@pytest.mark.parametrize("command", ["ms-score", "name", "erase", "human-agreement", "steerability"])
def test_where_the_settings_find_no_room_the_result_is_said_to_be_whole(command, world, printed, tmp_path, monkeypatch):
    """With --force it has replaced another, and is not as it was."""
    monkeypatch.chdir(world)
    output = tmp_path / f"made{Path(RESULTS[command][0]).suffix}"
    run(*words(command, output=str(output)))
    before = output.stat().st_mtime_ns
    flush = files._fsync_file

    def full(path):
        if str(path).endswith("settings.toml"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        flush(path)

    monkeypatch.setattr(files, "_fsync_file", full)
    text = " ".join(run(*words(command, output=str(output)), "--force", code=2).split())
    assert "while the record of its settings was written" in text
    assert f"{output} is whole without them; what made it is not beside it" in text
    assert "as it was" not in text
    assert output.stat().st_mtime_ns != before
    assert inspect(output)["made"] == {}, "not by what made the one before"


def test_tables_of_others_are_no_results(tmp_path):
    pq.write_table(pa.table({"latent": [1, 2], "weight": [3, 4]}), tmp_path / "mine.parquet")
    (tmp_path / "mine.csv").write_text("latent,weight\n1,2\n")
    (tmp_path / "mine.json").write_text('{"latents": [1, 2]}')
    for suffix in ("parquet", "csv", "json"):
        assert "neither store, SAE, run, matrix nor result" in run("inspect", tmp_path / f"mine.{suffix}", code=2)


@pytest.mark.parametrize("output", ["crossed/cross_modal.json", "scores.parquet"])
def test_a_damaged_result_is_one_line(output, world, printed, tmp_path):
    copy = tmp_path / "world"
    copy.mkdir()
    for name in ("crossed", "scores.parquet", "scores.parquet.settings.toml"):
        (shutil.copytree if (world / name).is_dir() else shutil.copy)(world / name, copy / name)
    data = (copy / output).read_bytes()
    (copy / output).write_bytes(data.replace(b'"kept": ', b'"kept":  ') if output.endswith("json") else data[:-9])
    text = run("inspect", copy / output.partition("/")[0], code=2)
    assert text.count("\n") == 1
    assert Path(output).name in text
    assert [item["kind"] for item in inspect(copy)["contents"]].count("damaged") == 1


def test_a_part_of_a_result_that_is_damaged_is_found_by_verify(world, printed, tmp_path):
    shutil.copytree(world / "evaluation", tmp_path / "evaluation")
    table = tmp_path / "evaluation" / "latents" / "run.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    found = inspect(tmp_path / "evaluation")
    with pytest.raises(ValueError, match=r"latents/run\.parquet"):
        verify_inspected(found)


def test_an_evaluation_of_before_is_read(world, printed, tmp_path):
    document = json.loads((world / "evaluation" / "evaluation.json").read_text())
    for each in document["subjects"]:
        figures = each["measures"]["reconstruction"]
        figures["dead_share"] = figures.pop("dead_fraction")
    (tmp_path / "evaluation.json").write_text(json.dumps(document | {"version": 1}))
    found = inspect(tmp_path)["figures"]
    assert found == inspect(world / "evaluation")["figures"]
    assert found["saes"] == ["run"]


def _keys(value: Any) -> Iterator[str]:
    """All names in what a command gives, but for those that come from elsewhere."""
    for each in value if isinstance(value, list) else ():
        yield from _keys(each)
    for key, each in value.items() if isinstance(value, dict) else ():
        if key not in OTHERS_MAKE_THE_KEYS:
            yield key
            yield from _keys(each)


def _quantity(key: str) -> str:
    """What a name is of, whatever way it is spelt: n_images and images, dead_share and dead_fraction, sd and std."""
    words = re.sub(r"(^|_)(sd|stdev|stddev)(?=_|$)", r"\1std", key.lower().removeprefix("n_").removeprefix("num_"))
    return re.sub(r"_(fraction|frac|rate|ratio|percentage)$", "_share", words)


def test_every_quantity_has_one_name(printed):
    names = defaultdict(set)
    for output in printed.values():
        for key in _keys(output):
            names[_quantity(key)].add(key)
    assert {"dead_share", "images", "std"} <= names.keys(), "they were walked"
    assert {what: sorted(several) for what, several in names.items() if len(several) > 1} == {}


# Of how many, in every output; what is a list or a path of these has another name.
COUNTS = ("images", "latents", "neurons", "rows", "pairs")


def test_a_quantity_has_one_type(printed):
    """In a table's rows the names are those of its columns, as erase's question `images`."""
    wrong, seen = [], set()
    for name, output in printed.items():
        for key, value in _values(output):
            if key in COUNTS:
                seen.add(key)
                wrong += [] if type(value) is int or value is None else [(name, key, value)]
    assert seen == set(COUNTS), "they were walked"
    assert wrong == []


def _values(value: Any) -> Iterator[tuple[str, Any]]:
    for each in value if isinstance(value, list) else ():
        yield from _values(each)
    for key, each in value.items() if isinstance(value, dict) else ():
        if key not in (*OTHERS_MAKE_THE_KEYS, "table"):
            yield key, each
            yield from _values(each)


def test_results_of_before_a_quantity_had_one_type_are_read(world, printed, tmp_path):
    document = json.loads((world / "erased.json").read_text())
    older = [{("rows" if key == "table" else key): each for key, each in layer.items()} for layer in document["layers"]]
    (tmp_path / "erased.json").write_text(json.dumps(document | {"version": 1, "layers": older}))
    assert inspect(tmp_path / "erased.json")["figures"] == inspect(world / "erased.json")["figures"]
    document = json.loads((world / "crossed" / "cross_modal.json").read_text())
    del document["sha256"]
    kinds = document.pop("latent_kinds")
    (tmp_path / "crossed").mkdir()
    older = document | {"latents": {"all": document["latents"], **kinds}}
    (tmp_path / "crossed" / "cross_modal.json").write_text(json.dumps(older))
    assert inspect(tmp_path / "crossed")["figures"] == inspect(world / "crossed")["figures"]


def test_two_names_would_be_found():
    for one, other in (("dead_fraction", "dead_share"), ("n_images", "images"), ("ms_sd", "ms_std"), ("SAEs", "saes")):
        assert _quantity(one) == _quantity(other)
    assert _quantity("rows") != _quantity("images")


def test_what_had_two_names_has_that_of_the_field(printed):
    """Not to be told by their letters."""
    found = {key for output in printed.values() for key in _keys(output)}
    assert {"corrected_mean", "mean_with_null", "counts", "interval"} <= found
    assert not {"corrected", "mean_with_undefined_as_null"} & found
