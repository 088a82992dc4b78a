"""saevlm-fast train with lists of values, and with [[sweep]] tables: several SAEs in one pass."""

import json
import shutil
import tomllib

import numpy as np
import pyarrow.parquet as pq
import pytest

from command import files_below, run, run_json
from saevlm_fast.cli.record import Record
from saevlm_fast.cli.sweep import expanded, names_of, one_of
from saevlm_fast.cli.toml import toml_text
from saevlm_fast.data.rows import open_activations
from saevlm_fast.errors import Interrupted
from saevlm_fast.settings import Several
from saevlm_fast.training.one_pass import OnePass
from saevlm_fast.training.streamed import Place
from tiny_tower import save_clip, save_photos


@pytest.fixture(scope="module")
def x(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "x.npy"
    np.save(path, np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32))
    np.save(path.with_name("e.npy"), np.random.default_rng(1).normal(size=(200, 4)).astype(np.float32))
    return path


def words(x, output, *more):
    return (
        *("train", "--activations", x, "--device", "cpu", "--steps", 3, "--batch-size", 32, "--output", output),
        *more,
    )


LISTS = ("--k", "2,3", "--expansion", "2,4")


def weights(folder):
    return (folder / "sae_weights.safetensors").read_bytes()


def test_lists_make_an_sae_of_every_combination(x, tmp_path):
    said = run(*words(x, tmp_path / "grid", *LISTS, "--embeddings", x.with_name("e.npy")))
    names = ["x2-k2", "x2-k3", "x4-k2", "x4-k3"]
    assert all(name in said for name in names)
    files = {"grid.json", "grid.parquet", "grid.svg", "settings.toml"}
    assert {path.name for path in (tmp_path / "grid").iterdir()} == {*names, *files}
    table = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert [row["name"] for row in table["saes"]] == names
    assert [(row["d_sae"], row["k"]) for row in table["saes"]] == [(16, 2), (16, 3), (32, 2), (32, 3)]
    assert pq.read_table(tmp_path / "grid" / "grid.parquet").to_pylist() == table["saes"]
    picture = (tmp_path / "grid" / "grid.svg").read_text()
    assert picture.count('class="mark"') == 2 + 3 * 4, "the legend of two sizes, and three panels of four"
    assert "MS on 200 images, by" in picture
    run(*words(x, tmp_path / "alone", "--k", 3, "--expansion", 4))
    assert weights(tmp_path / "alone") == weights(tmp_path / "grid" / "x4-k3")
    again = tmp_path / "again"
    run("train", "--config", tmp_path / "grid" / "x4-k3" / "settings.toml", "--output", again)
    assert weights(again) == weights(tmp_path / "alone")


def test_the_settings_make_the_same_again_and_a_file_may_have_tables(x, tmp_path):
    (tmp_path / "sweep.toml").write_text(
        f'activations = "{x}"\nsteps = 3\nbatch_size = 32\nk = 2\nd_sae = 16\ndevice = "cpu"\n'
        '[[sweep]]\narchitecture = "topk"\nlr = 1e-3\n[[sweep]]\narchitecture = "relu"\nl1 = 0.1\n'
        '[[sweep]]\narchitecture = "topk"\nexpansion = 4.0\nk = 3\n'
    )
    run("train", "--config", tmp_path / "sweep.toml", "--output", tmp_path / "grid")
    names = {"topk-lr0.001", "relu-l1_0.1", "topk-x4-k3"}
    assert {path.name for path in (tmp_path / "grid").iterdir() if path.is_dir()} == names
    document = tomllib.loads((tmp_path / "grid" / "settings.toml").read_text())
    assert [table["architecture"] for table in document["train"]["sweep"]] == ["topk", "relu", "topk"]
    run("train", "--config", tmp_path / "grid" / "settings.toml", "--output", tmp_path / "again")
    for name in names:
        assert weights(tmp_path / "again" / name) == weights(tmp_path / "grid" / name)
    assert "MS is left out" in json.loads((tmp_path / "grid" / "grid.json").read_text())["note"]


def test_dry_run_lists_them_with_memory_and_writes_nothing(x, tmp_path):
    before = files_below(tmp_path)
    found = run_json(*words(x, tmp_path / "grid", *LISTS, "--dry-run"))
    assert [text.split(":")[0] for text in found["saes"]] == ["x2-k2", "x2-k3", "x4-k2", "x4-k3"]
    assert all("kB" in text for text in found["saes"])
    assert found["memory_bytes"] > 0
    assert files_below(tmp_path) == before


def test_resume_and_force(x, tmp_path):
    run(*words(x, tmp_path / "grid", *LISTS))
    before = weights(tmp_path / "grid" / "x4-k3")
    assert "x2-k2 already holds a run" in run(*words(x, tmp_path / "grid", *LISTS), code=2)
    grid = tmp_path / "grid"
    first = {place: tomllib.loads((place / "settings.toml").read_text())["made"] for place in (grid, grid / "x4-k3")}
    for _ in range(2):
        run("train", "--config", grid / "settings.toml", "--resume", "--device", "cpu")
    for place, before_it in first.items():
        made = tomllib.loads((place / "settings.toml").read_text())["made"]
        assert made["command_line"] == before_it["command_line"], "that of the call that makes it from the start"
        assert made["began"] == before_it["at"]
        assert [call.endswith("--resume --device cpu") for call in made["calls"]] == [False, True]
    run(*words(x, tmp_path / "grid", "--k", "2,3", "--expansion", "2,4", "--seed", 5, "--force"))
    assert weights(tmp_path / "grid" / "x4-k3") != before
    assert "calls" not in tomllib.loads((grid / "settings.toml").read_text())["made"], "--force begins anew"
    assert "seed is 0, but" in run(*words(x, tmp_path / "grid", *LISTS, "--resume"), code=2)


def test_a_resume_with_another_list_is_the_call_that_makes_it_and_tells_of_saes_of_others(x, tmp_path):
    grid = tmp_path / "grid"
    run(*words(x, grid, "--k", "2,3"))
    text = run(*words(x, grid, "--k", "2,4", "--resume"))
    assert "grid also holds k3, of other calls: the summary leaves them out" in " ".join(text.split())
    document = tomllib.loads((grid / "settings.toml").read_text())
    assert [each["k"] for each in document["train"]["sweep"]] == [2, 4]
    assert "--k 2,4" in document["made"]["command_line"]
    assert ["--k 2,3" in call for call in document["made"]["calls"]] == [True, False]
    assert [row["name"] for row in json.loads((grid / "grid.json").read_text())["saes"]] == ["k2", "k4"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--k", "2,x"), "k: 'x' is not a whole number"),
        (("--k", "2,2"), "k: 2 is listed twice"),
        (("--k", "2,"), "k: '2,' has a value that is empty"),
        (("--k", "2,0"), "k: 0 must be at least 1"),
        (("--k", "2,99"), "k99: k: 99"),
        (("--architecture", "topk,tpk"), "architecture: 'tpk' is not one of"),
        (("--architecture", "topk,relu", "--k", "2,3"), "k: 2 is of"),
        (("--expansion", "2,4", "--d-sae", "16"), "expansion: give either expansion or d_sae, not both"),
        (("--d-sae", "16,32", "--expansion", "2"), "d_sae: give either d_sae or expansion, not both"),
        (("--steps", "3,4"), "steps: '3,4' is not a whole number"),
        (("--k", "2,3", "--embeddings", "x.npy"), "embeddings: 200 rows"),
        (("--embeddings", "x.npy"), "embeddings: of several SAEs"),
        (("--k", "2,3", "--scored-images", "7"), "scored_images: of a run from images"),
    ],
)
def test_bad_lists_are_refused(x, tmp_path, more, message):
    more = tuple(str(x) if word == "x.npy" else word for word in more)
    if message == "embeddings: 200 rows":
        more = (*more, "--validation", str(tmp_path / "held.npy"))
        np.save(tmp_path / "held.npy", np.zeros((20, 8), np.float32))
    said = run(*words(x, tmp_path / "out", *more), code=2)
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sweep = 3", "sweep is not a list of tables"),
        ("[[sweep]]\nk = 2\n[[sweep]]\nsteps = 4", "[[sweep]] 2: steps is the same for all SAEs"),
        ("[[sweep]]\nkk = 4", "sweep.toml: [[sweep]] 1: 'kk' is not a setting of train; did you mean"),
        ("[[sweep]]\nk = 2\n[[sweep]]\nk = 'x'", "sweep.toml: [[sweep]] 2: k = 'x' is not a whole number"),
        ("[[sweep]]\nk = 2\n[[sweep]]\nk = 99", "k99: k: 99"),
        ("[[sweep]]\nlr = -1.0\n[[sweep]]\nk = 2", "lr-1: lr: -1.0 must be a positive number"),
        ("[[sweep]]\nk = 2\n[[sweep]]\nk = 2", "sweep: two SAEs would both be in the directory"),
        ("k = [2, 3]\n[[sweep]]\nk = 4", "[[sweep]] 1: k is a list too"),
        ("[[sweep]]\nk = [2, 3]", "[[sweep]] 1: k of one table has several values"),
    ],
)
def test_bad_tables_are_refused(x, tmp_path, text, message):
    (tmp_path / "sweep.toml").write_text(text)
    assert message in run(*words(x, tmp_path / "out", "--config", tmp_path / "sweep.toml"), code=2)


def test_a_directory_of_one_run_is_not_that_of_several(x, tmp_path):
    run(*words(x, tmp_path / "one", "--k", 2))
    assert "holds a run of one SAE" in run(*words(x, tmp_path / "one", *LISTS, "--force"), code=2)


def test_a_directory_of_several_runs_is_not_that_of_one(x, tmp_path):
    run(*words(x, tmp_path / "many", *LISTS))
    told = " ".join(run(*words(x, tmp_path / "many", "--k", 2, "--resume"), code=2).split())
    settings = tmp_path / "many" / "settings.toml"
    assert "runs of one pass; they go on with: saevlm-fast train --config" in told
    run("train", "--config", settings, "--resume")


def test_combinations_and_names():
    base, tables = expanded({"steps": 3, "k": Several((1, 2)), "sweep": ({"lr": 0.1}, {"l1": 2.0})})
    assert base == {"steps": 3}
    assert tables == ({"lr": 0.1, "k": 1}, {"lr": 0.1, "k": 2}, {"l1": 2.0, "k": 1}, {"l1": 2.0, "k": 2})
    assert names_of(tables) == ["lr0.1-k1", "lr0.1-k2", "k1-l1_2", "k2-l1_2"]
    assert one_of({"expansion": 8.0, "k": 5}, {"d_sae": 4, "architecture": "relu"}) == {
        "d_sae": 4,
        "architecture": "relu",
    }
    text = toml_text({"train": {"a": 1, "sweep": [{"k": 1}, {"k": 2}]}, "made": {"b": 2}})
    assert tomllib.loads(text) == {"train": {"a": 1, "sweep": [{"k": 1}, {"k": 2}]}, "made": {"b": 2}}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Words of a run from 40 photos through a small tower, without layers and output; and embeddings of the photos."""
    folder = tmp_path_factory.mktemp("small")
    tower, photos = save_clip(folder / "clip"), save_photos(folder / "photos", 40)
    np.save(folder / "e.npy", np.random.default_rng(1).normal(size=(40, 4)).astype(np.float32))
    words = ("train", "--model", f"hf:{tower}", "--images", photos, "--device", "cpu", "--workers", 0, "--steps", 4)
    return (*words, "--batch-size", 16, "--image-batch", 8, "--d-sae", 32, "--buffer", 40), folder


def scores_of(folder):
    table = json.loads((folder / "grid.json").read_text())
    return table["note"], [row["ms_mean"] for row in table["saes"]]


def test_one_pass_over_images_with_a_grid(small, tmp_path):
    words, _ = small
    kept, out = tmp_path / "kept", tmp_path / "out"
    said = run(*words, "--layer", "0,2", "--k", "3,4", "--output", out, "--keep-store", kept, "--scored-images", 30)
    names = ["residual-0-cls/k3", "residual-0-cls/k4", "residual-2-cls/k3", "residual-2-cls/k4"]
    assert all(name in said for name in names)
    table = json.loads((out / "grid.json").read_text())
    assert [row["name"] for row in table["saes"]] == names
    assert table["of"] == "last training"
    assert table["note"] == "MS on 30 of the images trained on, by the tower's own projection"
    assert {path.name for path in kept.iterdir() if path.is_dir()} == {"residual-0-cls", "residual-2-cls"}
    assert '"eval/ms_mean"' in (out / names[0] / "metrics.jsonl").read_text()
    again = tmp_path / "again"
    run("train", "--config", out / "residual-2-cls" / "k4" / "settings.toml", "--output", again)
    assert weights(again) == weights(out / "residual-2-cls" / "k4")
    run("train", "--config", out / "settings.toml", "--resume")
    assert json.loads((out / "grid.json").read_text()) == table
    assert "already holds a run" in run("train", "--config", out / "settings.toml", code=2)


def test_the_score_of_one_pass_is_that_of_a_store(small, tmp_path):
    """Of all images, patch by patch, by the file's embeddings: those of ms-score on what was kept."""
    words, folder = small
    embeddings = ("--embeddings", folder / "e.npy")
    out, kept = tmp_path / "out", tmp_path / "kept"
    run(*words, "--layer", 2, "--tokens", "patches", "--k", "3,4", "--output", out, "--keep-store", kept, *embeddings)
    note, (score, _) = scores_of(out)
    assert note == f"MS on 40 of the images trained on, by {folder / 'e.npy'}"
    order = [int(image[-7:-4]) for image in open_activations(kept).items()["image"].to_pylist()[::16]]
    names = sorted(str(path.relative_to(folder / "photos")) for path in (folder / "photos").rglob("*.png"))
    rows = np.load(folder / "e.npy")[[[int(name[-7:-4]) for name in names].index(number) for number in order]]
    np.save(tmp_path / "in their order.npy", rows)
    of = ("--sae", out / "k3", "--activations", kept, "--pool", "max", "--one-pass")
    given = ("--embeddings", tmp_path / "in their order.npy", "--output", tmp_path / "scores.parquet")
    assert run_json("ms-score", *of, *given)["mean"] == pytest.approx(score, rel=1e-4)
    shutil.copytree(folder / "photos", tmp_path / "copies")
    held_out = ("--validation-images", tmp_path / "copies")
    run(
        *words, "--layer", 2, "--tokens", "patches", "--k", "3,4", "--output", tmp_path / "held", *held_out, *embeddings
    )
    note, (score, _) = scores_of(tmp_path / "held")
    assert note == f"MS on 40 held-out images, by {folder / 'e.npy'}"
    assert score == pytest.approx(scores_of(out)[1][0], rel=1e-4), "the same images"
    store = ("train", "--activations", kept, "--device", "cpu", "--steps", 4, "--batch-size", 16, "--d-sae", 32)
    run(*store, "--k", "3,4", "--embeddings", tmp_path / "in their order.npy", "--output", tmp_path / "from store")
    assert scores_of(tmp_path / "from store")[0].startswith("MS on 40 images, by")


def test_one_sae_in_one_pass_has_a_score_too_unless_none_is_wanted(small, tmp_path):
    words, _ = small
    found = run_json(*words, "--layer", 2, "--k", 3, "--output", tmp_path / "one")
    assert -1 <= found["evaluation"]["ms_mean"] <= 1
    found = run_json(*words, "--layer", 2, "--k", 3, "--output", tmp_path / "none", "--scored-images", 0)
    assert "ms_mean" not in found["evaluation"]
    assert found["note"] == "MS is left out: --scored-images is 0"


def test_one_pass_dry_run_writes_nothing(small, tmp_path):
    words, _ = small
    before = files_below(tmp_path)
    found = run_json(*words, "--point", "projection", "--k", 3, "--output", tmp_path / "out", "--dry-run")
    assert found["images_through_the_tower"] == 64
    assert found["memory_bytes"] > 0
    assert found["all_steps_seconds"] == pytest.approx(4 * found["a_step_seconds"])
    assert found["places"][0].startswith("projection: 40 x ")
    assert found["scores"] == "MS on 40 of the images trained on, by the tower's own projection"
    few = (*words, "--layer", 1, "--k", 3, "--output", tmp_path / "out", "--dry-run", "--steps", 1)
    plain, keeping = run_json(*few), run_json(*few, "--keep-store", tmp_path / "store")
    assert (plain["images_through_the_tower"], keeping["images_through_the_tower"]) == (16, 40)
    width = int(plain["places"][0].removeprefix("residual-1-cls: 40 x ").removesuffix(" an epoch"))
    assert keeping["of_the_kept_store_bytes"] == keeping["disk_bytes"] - plain["disk_bytes"] == 40 * width * 4
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--layer", 9), "layer: 9 of hf:"),
        (("--layer", 2, "--buffer", 15), "buffer: 15 are 15 rows, which must be at least batch_size = 16"),
        (("--layer", 2, "--buffer", "2 TB"), "buffer: '2 TB' is not a number of rows"),
        (("--layer", 2, "--activations", "x.npy"), "activations: does not go with model"),
        (("--layer", 2, "--validation", "x.npy"), "validation: does not go with model"),
        (("--layer", 2, "--validation-images", "photos"), "validation_images: photos: are what is trained on; without"),
        (("--layer", 2, "--validation-images", "gone"), "validation_images: gone: no such file or folder"),
        (("--layer", 2, "--embeddings", "x.npy"), "embeddings: 200 rows of x.npy, but 40 images; row i is image i"),
        (("--layer", "2,2"), "layer: 2 is listed twice"),
        (("--layer", 2, "--keep-store", "out"), "keep_store: out is the output"),
        (("--layer", 2, "--keep-store", "."), "keep_store: . is not empty and holds no harvest"),
        (("--layer", 2, "--images", "damaged", "--max-skipped", 1), "images: none of 2 images could be used; the last"),
        (
            ("--layer", 2, "--validation-images", "damaged", "--max-skipped", 1),
            "images: none of the 2 images of damaged could be used; that is of the evaluation alone",
        ),
        (("train", "--model", "hf:tiny-clip", "--layer", 3), "images: needed with model"),
        (("train", "--images", "scenes:train:9"), "model: needed with images"),
        (("train", "--layer", 2, "--steps", 3), "layer: of a run from images; give --model and --images"),
    ],
)
def test_what_one_pass_refuses(small, x, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npy").symlink_to(x)
    (tmp_path / "photos").symlink_to(small[1] / "photos")
    (tmp_path / "damaged").mkdir()
    for name in "ab":
        (tmp_path / "damaged" / f"{name}.png").write_text("no image")
    more = more if more[0] == "train" else (*small[0], *more)
    said = run(*more, "--output", "out", code=2)
    assert message in " ".join(said.split())
    assert "evaluation alone" in message or not (tmp_path / "out").exists()


@pytest.mark.parametrize("of", ["images", "store"])
def test_an_interrupted_pass_says_how_it_goes_on(small, x, tmp_path, monkeypatch, of):
    """Before the first step there is no settings.toml, or one of the run that was to be replaced."""

    def stopped(*_, **__):
        raise Interrupted("interrupted after step 0; continue with --resume")

    command = (*small[0], "--layer", 2) if of == "images" else words(x, tmp_path / "out")
    command = (*command, "--k", "2,3", "--output", tmp_path / "out")
    name = "saevlm_fast.training.one_pass.OnePass.steps" if of == "images" else "saevlm_fast.training.many._steps"
    with monkeypatch.context() as patch:
        patch.setattr(name, stopped)
        assert run(*command, code=130).endswith("step 0; continue with the same command and --resume\n")
    run(*command, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(name, stopped)
        text = run(*command, "--force", code=130)
    assert text.endswith("step 0; start again with the same command\n")


def test_settings_of_an_old_run_stay_until_it_is_replaced(small, tmp_path, monkeypatch):
    """Places begin one after another; an unfinished replacement may lie there from before."""
    output = tmp_path / "out"
    command = (*small[0], "--layer", 1, "--tokens", "cls,all", "--k", 2, "--output", output, "--scored-images", 0)
    run(*command)
    written: list[str] = []
    write = Record.write

    def noted(record):
        written.extend([] if record.written or record.result == output else [record.result.name])
        write(record)

    def cut(place):
        raise Interrupted("interrupted")

    second = output / "residual-1-cls"  # whose buffer is full last
    old = (second / "settings.toml").read_bytes()
    begin = Place.begin
    monkeypatch.setattr(Record, "write", noted)
    for stale in (False, True):
        if stale:
            (second / ".replacement").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(Place, "begin", lambda place: (cut if place.name == second.name else begin)(place))
            said = run(*command, "--lr", 1e-3, "--force", code=130)
        assert said.endswith("start again with the same command\n")
        assert (second / "settings.toml").read_bytes() == old
    assert written
    assert second.name not in written
    run(*command, "--lr", 1e-3, "--force")
    assert all("lr = 0.001" in path.read_text() for path in output.rglob("settings.toml"))


def test_an_interrupted_replacement_names_its_own_settings(small, tmp_path, monkeypatch):
    output = tmp_path / "out"
    command = (*small[0], "--layer", 1, "--k", 2, "--output", output, "--scored-images", 0)
    run(*command)
    with monkeypatch.context() as patch:
        patch.setattr(OnePass, "_stops", lambda one_pass, _: one_pass.places[0].buffer.step == 2)
        said = run(*command, "--lr", 1e-3, "--force", code=130)
    settings = output / ".replacement" / "settings.toml"
    assert said.endswith(f"after step 2; continue with: saevlm-fast train --config {settings} --resume\n")
    run("train", "--config", settings, "--resume")
    assert "lr = 0.001" in (output / "settings.toml").read_text()
