"""The files of a report: what they hold, how they are replaced, gone on with, and kept apart from strangers'."""

import base64
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from command import files_below, run, run_json
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import CodesWriter
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.errors import Interrupted
from saevlm_fast.formats.sae_header import sae_digest
from saevlm_fast.look import report as report_module
from saevlm_fast.look.chunks import script
from saevlm_fast.look.settings import ReportSettings
from saevlm_fast.look.spill import Spill
from saevlm_fast.look.store_images import StoreImages
from saevlm_fast.sae import SparseAutoencoder

CHUNK = "s0/chunk-0000.js"


def value_of(path):
    """What a script of data defines."""
    name, value = re.fullmatch(r'SAEVLM\.define\(("[^"]*"),(.*)\);\n', path.read_text()).groups()
    return json.loads(name), json.loads(value)


def words(planted, output, *more):
    return (
        *("report", "--sae", planted / "sae", "--activations", planted / "store"),
        *("--device", "cpu", "--output", output, *more),
    )


def test_a_report_holds_what_a_page_shows(report):
    _, index = value_of(report / "data" / "index.js")
    (sae,) = index["saes"]
    assert (sae["dSae"], sae["nImages"], sae["grid"]) == (16, 90, [8, 8])
    keys = [measure["key"] for measure in sae["measures"]]
    assert keys[:3] == ["density", "row_density", "ms"]
    assert "purity" in keys
    name, latents = value_of(report / "data" / "s0" / "chunk-0000.js")
    assert name == "s0/chunk/0"
    assert len(latents) == 16
    assert "t" not in latents[0], "a dead latent has no images"
    acts = [act for _, act, _ in latents[3]["t"]]
    assert acts == sorted(acts, reverse=True)
    assert sum(count for count, _ in latents[3]["b"]) == round(90 * density_of(sae, 3))
    _, tiles = value_of(report / "data" / "tiles-0000.js")
    assert index["images"]["shown"] == len(tiles)
    assert all(width == height == 48 for _, _, width, height, *_ in tiles)
    assert (report / "sprites" / "sheet-00000.webp").stat().st_size > 1000
    assert "settings.toml" in {path.name for path in report.iterdir()}
    assert not any(path.name.startswith(".") for path in report.iterdir())


def density_of(sae, latent):
    import base64
    import struct

    column = next(measure for measure in sae["measures"] if measure["key"] == "density")
    return struct.unpack_from("<f", base64.b64decode(column["values"]), 4 * latent)[0]


def test_nothing_in_a_script_is_markup(report):
    hostile = script("a", ["</script><script>alert(1)</script>", "\u2028", "<!--", float("1.5")])
    assert "<" not in hostile
    assert "\u2028" not in hostile
    assert json.loads(hostile.split(",", 1)[1].removesuffix(");\n"))[0].startswith("</script>")
    with pytest.raises(ValueError, match="not JSON compliant"):
        script("a", float("nan"))
    for path in report.rglob("*.js"):
        if "data" in path.parts:
            assert "<" not in path.read_text()
    assert "onerror" not in (report / "index.html").read_text()


def test_a_report_is_replaced_when_asked_and_nothing_else_is(planted, tmp_path):
    run(*words(planted, tmp_path / "r"))
    before = files_below(tmp_path)
    for more in ((), ("--dry-run",)):
        assert "already holds a report; --force replaces it" in run(*words(planted, tmp_path / "r", *more), code=2)
    assert files_below(tmp_path) == before
    (tmp_path / "r" / "mine.txt").write_text("mine")
    run(*words(planted, tmp_path / "r", "--force", "--images", "none"))
    assert (tmp_path / "r" / "mine.txt").read_text() == "mine"
    assert not list((tmp_path / "r" / "sprites").glob("*.webp"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").touch()
    assert "is not empty and holds no report" in run(*words(planted, tmp_path / "other", "--force"), code=2)


def test_interrupted_it_goes_on_from_the_codes(planted, tmp_path, monkeypatch):
    def stop(*arguments):
        raise Interrupted("interrupted")

    appended = []
    append = Spill.append
    monkeypatch.setattr(Spill, "append", lambda self, codes: (appended.append(self.path), append(self, codes))[1])
    with monkeypatch.context() as patch:
        patch.setattr(report_module, "write_sheets", stop)
        text = run(*words(planted, tmp_path / "r"), code=130)
    assert "interrupted; the same command goes on where it stopped" in text
    n = len(appended)
    assert n > 0
    assert not (tmp_path / "r" / "index.html").exists()
    run(*words(planted, tmp_path / "r"))
    assert len(appended) == n, "nothing was encoded again"
    assert (tmp_path / "r" / "index.html").exists()
    assert not (tmp_path / "r" / ".replacement").exists()


def test_pictures_of_an_interrupted_call_are_not_published_by_one_without(planted, tmp_path, monkeypatch):
    def stop(*arguments):
        raise Interrupted("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(report_module, "write_folder", stop)
        run(*words(planted, tmp_path / "r"), code=130)
    assert list((tmp_path / "r" / ".replacement" / "sprites").iterdir())
    run(*words(planted, tmp_path / "r", "--images", "none"))
    assert not list((tmp_path / "r" / "sprites").iterdir())


def test_an_untrained_control_is_made_with_the_l0_of_the_sae(planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*words(planted, tmp_path / "r", "--control-sae", "untrained"))
    _, index = value_of(tmp_path / "r" / "data" / "index.js")
    own, control = index["saes"]
    assert index["control"] == 1
    assert [control["name"], control["dSae"], control["steer"]] == ["untrained control", 16, None]
    assert own["steer"] is not None

    def l0(sae):
        (column,) = (each["values"] for each in sae["measures"] if each["key"] == "row_density")
        return np.frombuffer(base64.b64decode(column), "<f4").sum()

    assert l0(control) == pytest.approx(l0(own), rel=0.25)
    shutil.copytree(planted / "sae", tmp_path / "untrained")
    run(*words(planted, tmp_path / "r", "--control-sae", "untrained", "--force"))
    _, index = value_of(tmp_path / "r" / "data" / "index.js")
    assert index["saes"][1]["steer"] is not None, "a directory of that name is what is meant"


def test_texts_of_a_parquet_table_are_shown(planted, tmp_path):
    """Texts of parquet are read as dictionaries."""
    pq.write_table(pa.table({"latent": [3], "best_label": ["a red one"]}), tmp_path / "scores.parquet")
    run(*words(planted, tmp_path / "r", "--scores", tmp_path / "scores.parquet"))
    _, latents = value_of(tmp_path / "r" / "data" / "s0" / "chunk-0000.js")
    assert latents[3]["n"] == [["best_label", "a red one"]]


def test_what_is_left_of_other_rows_is_not_gone_on_with(planted, tmp_path, monkeypatch):
    """A store harvested anew at the same place, with as many rows, has other codes."""

    def stop(*arguments):
        raise Interrupted("interrupted")

    shutil.copytree(planted / "store", tmp_path / "store")
    command = (*words(planted, tmp_path / "r")[:3], "--activations", tmp_path / "store", "--device", "cpu")
    command += ("--output", tmp_path / "r", "--images", "none")
    with monkeypatch.context() as patch:
        patch.setattr(report_module, "write_sheets", stop)
        run(*command, code=130)
    rows = open_activations(planted / "store")
    shutil.rmtree(tmp_path / "store")
    items = pa.concat_tables(rows.iter_items()).to_pydict()
    with ActivationWriter(tmp_path / "store", rows.d, torch.float32, rows.source, 1000) as writer:
        writer.append(torch.zeros(rows.n_rows, rows.d), items)
    run(*command)
    _, latents = value_of(tmp_path / "r" / "data" / "s0" / "chunk-0000.js")
    assert "t" not in latents[3], "it fires on none of the new rows"


def test_codes_of_another_sae_are_refused(planted, tmp_path):
    sae = SparseAutoencoder.from_pretrained(planted / "sae")
    source = {"sae": {"path": "sae", "sha256": sae_digest(planted / "sae")}}
    with CodesWriter(tmp_path / "codes", 16, torch.float32, source) as writer:
        items = {"image": list("abcd"), "token": [-1] * 4, "label": [None] * 4}
        writer.write_shard(0, sae.encode(torch.ones(4, 12)), items)
    with torch.no_grad():
        sae.W_enc.mul_(2)
    sae.save_pretrained(tmp_path / "other")
    more = ("--codes", tmp_path / "codes", "--output", tmp_path / "r", "--device", "cpu")
    assert "are of another SAE" in run("report", "--sae", tmp_path / "other", *more, code=2)


def test_rows_of_pictures_of_two_places_are_no_one_report(planted, tmp_path):
    """a/0001.png of one place is not that of the other."""
    sae = SparseAutoencoder.from_pretrained(planted / "sae")
    for name in ("one", "two"):
        with CodesWriter(tmp_path / name, 16, torch.float32, {"images": {"path": name}}) as writer:
            items = {"image": list("abcd"), "token": [-1] * 4, "label": [None] * 4}
            writer.write_shard(0, sae.encode(torch.ones(4, 12)), items)
    more = [word for name in ("one", "two") for word in ("--sae", planted / "sae", "--codes", tmp_path / name)]
    more = ("report", *more, "--device", "cpu", "--output", tmp_path / "r")
    assert "are of images in two" in run(*more, code=2)
    run(*more, "--images", "none")


@pytest.mark.parametrize("how", ["max", "mean"])
def test_the_scale_of_the_heat_maps_ends_at_the_largest_patch(how, planted, tmp_path):
    """An image's mean is far below its largest patch: on its scale all patches would look alike."""
    run(*words(planted, tmp_path / "r", "--pool", how))
    _, index = value_of(tmp_path / "r" / "data" / "index.js")
    _, latents = value_of(tmp_path / "r" / "data" / "s0" / "chunk-0000.js")
    heat_max = np.frombuffer(base64.b64decode(index["saes"][0]["heatMax"]), "<f4")[3]
    rows = open_activations(planted / "store")
    sae = SparseAutoencoder.from_pretrained(planted / "sae")
    acts_R = torch.cat([sae.encode(x).dense().detach() for _, x in rows.chunks(1000)])[:, 3]
    assert heat_max == pytest.approx(float(acts_R.max()))
    full = sum((np.frombuffer(base64.b64decode(heat), np.uint8)[2::3] == 255).sum() for *_, heat in latents[3]["t"])
    assert full <= int((acts_R > 0.997 * acts_R.max()).sum())


def test_one_file_holds_everything(planted, tmp_path):
    said = run_json(*words(planted, tmp_path / "one.html", "--single-file"))
    text = (tmp_path / "one.html").read_text()
    assert said["bytes"] == len(text.encode())
    assert "data:image/webp;base64," in text
    assert not re.search(r"<script src|<link", text)
    assert "script-src 'sha256-" in text
    assert {path.name for path in tmp_path.iterdir()} == {"one.html", "one.html.settings.toml"}
    assert "already exists; --force replaces it" in run(*words(planted, tmp_path / "one.html", "--single-file"), code=2)
    said = run(*words(planted, tmp_path / "two.html"), code=2)
    assert f"output: '{tmp_path}/two.html' ends in .html: without --single-file it is a folder" in said
    said = run(*words(planted, tmp_path / "two", "--single-file"), code=2)
    assert f"output: with --single-file it ends in .html: '{tmp_path}/two' does not" in said
    large = SparseAutoencoder(SAEConfig(12, 2001, 3, "topk"))
    large.save_pretrained(tmp_path / "large")
    said = run("report", "--sae", tmp_path / "large", "--activations", planted / "store", "--single-file", "--output",
               tmp_path / "x.html", code=2)  # fmt: skip
    assert "single_file: 2,001 latents, at most 2,000" in said


def test_what_the_pages_lack_is_told_with_the_reason(planted, tmp_path):
    store = open_activations(planted / "store")
    rows = torch.cat([x for _, x in store.chunks(1000)])
    np.save(tmp_path / "rows.npy", rows[:40].numpy())
    files = "--sae", planted / "sae", "--activations", tmp_path / "rows.npy", "--images", "none", "--device", "cpu"
    said = run("report", *files, "--output", tmp_path / "r")
    lines = [line for line in said.splitlines() if line.startswith("left out: ")]
    assert lines == [
        "left out: heat maps: the rows have no token positions (a matrix file)",
        "left out: MS: no --embeddings",
        "left out: names: no --text-model (with --embeddings) and no --names",
    ]
    assert len(run_json("report", *files, "--output", tmp_path / "again")["left_out"]) == 3


def test_missing_images_are_counted(planted, tmp_path):
    (tmp_path / "others").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "others" / "unknown.png")
    said = run_json(*words(planted, tmp_path / "r", "--images", tmp_path / "others"))
    assert said["missing"] == said["images"] > 0
    assert "images are missing" in run(*words(planted, tmp_path / "r", "--images", tmp_path / "others", "--force"))
    _, tiles = value_of(tmp_path / "r" / "data" / "tiles-0000.js")
    assert {tuple(tile[2:4]) for tile in tiles} == {(0, 0)}
    assert StoreImages({"images": {"path": str(planted / "photos")}}).problem is None


def test_several_saes_tables_and_labels(planted, tmp_path):
    other = SparseAutoencoder(SAEConfig(12, 24, 2, "matryoshka", (8, 16)))
    other.reset_parameters(1)
    other.threshold.fill_(0.1)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "a.csv").write_text("latent,ms,ms_low,ms_high,depth\n3,0.5,0.4,0.6,2\n")
    (tmp_path / "b.csv").write_text("latent,ms\n23,0.25\n")
    names = [{"latent": 3, "name": "red", "word_1": "red", "score_1": 0.5, "score": 0.5}]
    (tmp_path / "n.json").write_text(json.dumps({"latents": names}))
    (tmp_path / "m.json").write_text(json.dumps([{"latent": 0, "name": None}]))
    lines = [f"a/{i:04d}.png,x,class {i % 4}" for i in range(80)] + [
        "a/0000.png,y,class 0"
    ]  # an image with two kinds, and one class
    (tmp_path / "labels.csv").write_text("\n".join(["image,kind,class", *lines]))
    saes = ("--sae", planted / "sae", "--sae", tmp_path / "other")
    tables = ("--scores", tmp_path / "a.csv", "--scores", tmp_path / "b.csv", "--names", tmp_path / "n.json")
    rest = ("--names", tmp_path / "m.json", "--labels", tmp_path / "labels.csv", "--activations", planted / "store")
    run("report", *saes, *tables, *rest, "--output", tmp_path / "r", "--device", "cpu")
    _, index = value_of(tmp_path / "r" / "data" / "index.js")
    first, second = index["saes"]
    assert [first["name"], second["name"]] == ["sae", "other"]
    assert second["groups"] == [8, 16]
    assert {"ms", "ms_low", "ms_high", "depth"} <= {measure["key"] for measure in first["measures"]}
    assert first["names"][3] == "red"
    assert second["names"] is None
    assert first["classes"]["names"] == ["class 0", "class 1", "class 2", "class 3"]
    few = run("report", *saes, "--scores", tmp_path / "a.csv", "--activations", planted / "store", "--output",
              tmp_path / "s", code=2)  # fmt: skip
    assert "scores: 1 given for 2 SAEs; one each, or none" in few


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--scores", "{root}/none.csv"), "none.csv: no such file"),
        (("--scores", "{root}/bad.csv"), "it has no column latent"),
        (("--scores", "{root}/far.csv"), "latent 16 is not within 0 to 15"),
        (("--labels", "{root}/bad.csv"), "bad.csv: no line of any of the "),
        (("--labels", "{root}/many.csv"), "many.csv: an image has several in every column; a report shows one each"),
        (("--labels", "{root}/bad.txt"), "bad.txt does not end in .csv or .parquet"),
        (("--embeddings", "{root}/few.npy"), "embeddings: 3 rows"),
        (("--taxonomy", "{root}/bad.txt"), "does not end in .json or .csv"),
        (("--taxonomy", "{root}/other.json"), "has none of the classes"),
        (("--steering", "{root}/far.csv"), "latent 16 is not within 0 to 15"),
        (("--control-sae", "{root}/none"), "none"),
        (("--codes", "{root}"), "no index.json"),
        (("--n", "0"), "n: 0 must be between 1 and 64"),
    ],
)
def test_bad_inputs_are_one_line(more, message, planted, tmp_path):
    import numpy as np

    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "many.csv").write_text("image,class\na/0000.png,x\na/0000.png,y\n")
    (tmp_path / "far.csv").write_text("latent,ms\n16,2\n")
    (tmp_path / "other.json").write_text('{"a label": ["root", "a label"]}')
    np.save(tmp_path / "few.npy", np.ones((3, 4), np.float32))
    text = run(*words(planted, tmp_path / "r", *(each.format(root=tmp_path) for each in more)), code=2)
    assert message in text
    assert not (tmp_path / "r").exists() or not any((tmp_path / "r").iterdir())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="activations: give --activations, --codes or both"):
        ReportSettings(sae=("a",), output="x")
    with pytest.raises(ValueError, match="activations: needed with --control-sae"):
        ReportSettings(sae=("a",), output="x", codes=("c",), control_sae="b")
    with pytest.raises(ValueError, match="embeddings: needed with --text-model"):
        ReportSettings(sae=("a",), output="x", activations="a", text_model="hf:x")


def test_codes_with_their_activations_say_what_activations_alone_say(planted, tmp_path):
    """Near misses and explained variance need to ask the SAE, which codes alone cannot."""
    sae = SparseAutoencoder.from_pretrained(planted / "sae").eval()
    rows = open_activations(planted / "store")
    items = {name: [] for name in ("image", "token", "label")}
    for table in rows.iter_items():
        for name, column in items.items():
            column += table[name].to_pylist()
    with CodesWriter(tmp_path / "codes", 16, torch.float32, rows.source) as writer, torch.no_grad():
        writer.write_shard(0, sae.encode(torch.cat([x for _, x in rows.chunks(1000)])), items)
    only = ("report", "--sae", planted / "sae", "--codes", tmp_path / "codes", "--device", "cpu")
    run(*only, "--output", tmp_path / "alone")
    run(*only, "--output", tmp_path / "both", "--activations", planted / "store")
    run(*words(planted, tmp_path / "activations"))
    found = {}
    for name in ("alone", "both", "activations"):
        (_, index), (_, latents) = (value_of(tmp_path / name / "data" / each) for each in ("index.js", CHUNK))
        found[name] = index["saes"][0]["near"], [latent["m"] for latent in latents]
    assert found["alone"] == (None, [[]] * 16)
    assert found["both"] == found["activations"]
    assert any(found["both"][1])
    np.save(tmp_path / "few.npy", np.ones((3, 12), np.float32))
    np.save(tmp_path / "narrow.npy", np.ones((90, 4), np.float32))
    for name, message in (("few", "are not of the images of"), ("narrow", "needs rows of width 12, but")):
        other = ("--activations", tmp_path / f"{name}.npy")
        assert message in run(*only, "--output", tmp_path / name, *other, code=2)
