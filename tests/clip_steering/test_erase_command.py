"""`saevlm-fast erase` from the command line: labels of folders and files, outputs, going on, what is refused."""

import csv
import json
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from command import run, run_json
from saevlm_fast.cli.erase_images import halves_of
from saevlm_fast.cli.erase_options import EraseArguments
from saevlm_fast.cli.erase_picture import write_accuracy_picture
from saevlm_fast.cli.record import Record
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.label_sets import halves
from saevlm_fast.errors import Interrupted
from saevlm_fast.images.open import open_images
from saevlm_fast.measures import parts
from saevlm_fast.sae import SparseAutoencoder

SVG = "{http://www.w3.org/2000/svg}"
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two SAEs of tiny-clip's width; folders of pictures by colour, with a place of each in a table."""
    root = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        SparseAutoencoder(SAEConfig(128, 64, 8, "topk")).save_pretrained(root / name)
    random, lines = np.random.default_rng(0), []
    for name, colour in COLOURS.items():
        for i in range(26):
            pixels = np.clip(np.array(colour) + random.normal(0, 20, (48, 48, 3)), 0, 255).astype(np.uint8)
            file = root / "photos" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
            lines.append((f"{name}/{i}.png", "teal" if i % 2 else "navy", "same"))
    with open(root / "places.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "place", "only"), *lines])
    (root / "words.csv").write_text(
        "label,text,word,test_word\nred,a red thing,rot,rouge\nblue,a blue thing,blau,bleu\n"
    )
    (root / "cyrillic.csv").write_text("label,word\nred,\u0440\u043e\u0442\nblue,blau\n", encoding="utf-8")
    (root / "half.csv").write_text("label,text\nred,a red thing\n")
    (root / "same.csv").write_text("label,text,word\nred,a red thing,rot\nblue,a blue thing,rot\n")
    (root / "empty.csv").touch()
    (root / "few.csv").write_text("image,place\nred/0.png,a\nred/1.png,b\nblue/1.png,b\n")
    (root / "odd.csv").write_text("label,name\nred,a\n")
    shutil.copytree(root / "photos" / "red", root / "single" / "red")
    return root


def call(world, output, *more, sae="one", layer="2", **given):
    """Options by name are in the place of what a call has without them."""
    options = {
        "model": "hf:tiny-clip",
        "sae": ",".join(str(world / name) for name in sae.split(",")),
        "layer": layer,
        "images": world / "photos",
        "k": "1,3",
        "class_words": world / "words.csv",
        "device": "cpu",
        "output": output,
    } | given
    return "erase", *(word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)), *more


def test_words_on_a_folder_of_pictures(world, tmp_path):
    output, places = tmp_path / "w.json", f"{world}/places.csv:place"
    more = ("--limit", 26, "--groups", places, "--also", places)
    prompts = ("--class-prompts", "a scene on {}")
    found = run_json(*call(world, output, *more, *prompts, "--select", "auroc", sae="one,two", layer="2,3", k="1"))
    document = json.loads(output.read_text())
    assert found == {"output": str(output), **document}
    assert [each["layer"] for each in document["layers"]] == [2, 3]
    rows = document["layers"][1]["table"]
    each_k = [(name, 1) for name in ("latents", "random", "magnitude", "pca", "probe")]
    assert [(row["removal"], row["k"]) for row in rows] == [("nothing", 0), *each_k]
    assert list(rows[0]) == ["removal", "k", "clean", places, "attacked", "nonsense", "reads"]
    assert rows[0]["clean"]["worst"]["group"] in {f"{a}, {b}" for a in COLOURS for b in ("teal", "navy")}
    with open(tmp_path / "w.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * len(rows) * 5
    line = next(each for each in table if each["removal"] == "probe" and each["layer"] == "3")
    assert float(line["accuracy"]) == pytest.approx(rows[-1]["clean"]["value"])
    picture = ElementTree.parse(tmp_path / "w.svg")
    texts = [each.text for each in picture.iter(f"{SVG}text")]
    shown = {"layer 2", "layer 3", "clean", "attacked", "nonsense", "latents", "probe", "nothing", "1"}
    assert shown <= set(texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.csv", "w.json", "w.json.settings.toml", "w.svg"]


def test_a_label_is_erased_and_the_worst_group_beside_it(world, tmp_path):
    places = f"{world}/places.csv:place"
    more = ("--what", places, "--class-prompts", "a scene on {}", "--groups", places, "--limit", 20)
    [layer] = run_json(*call(world, tmp_path / "p.json", *more))["layers"]
    assert list(layer["table"][0]) == ["removal", "k", "images", places]
    assert [row["k"] for row in layer["table"] if row["removal"] == "pca"] == [1]  # two values differ in one direction
    assert layer["table"][0]["images"]["worst"] is not None


def test_damaged_files_are_left_out_and_named(world, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(world / "photos", photos)
    ids = [f"{name}/{i}.png" for name in COLOURS for i in range(26)]
    first = halves(ids)
    for name in [*np.array(ids)[first][::3], *np.array(ids)[~first][::5]]:
        (photos / name).write_bytes(b"no picture")
    output = tmp_path / "w.json"
    text = run(*call(world, output, images=photos, k=1))
    assert "warning: images: " in text
    assert "for choosing are not usable and were left out, the first is " in text
    assert "warning: test_images: 3 of 14 to ask about are not usable and were left out, the first is " in text
    of_layer = json.loads(output.read_text())["layers"][0]
    assert [of_layer[name] for name in ("images_for_choosing", "images_asked_about")] == [38 - 13, 14 - 3]
    assert of_layer["table"][0]["clean"]["n"] == 14 - 3


def test_images_are_drawn_from_all_of_a_sorted_folder(world):
    """Folders are in the order of their classes: the first 10 are of one."""
    photos = open_images(str(world / "photos"))
    labels = {}
    for seed in (0, 1):
        options = EraseArguments(
            model="hf:tiny-clip",
            sae=(world / "one",),
            layer=(2,),
            images=str(world / "photos"),
            limit=10,
            seed=seed,
            output=world / "w.json",
        )
        (_, train), (_, test) = halves_of(options, photos, photos)
        assert len(train) == len(test) == 10
        assert train == sorted(set(train))
        assert not set(train) & set(test)
        labels[seed] = [{photos.label(i) for i in half} for half in (train, test)]
        assert labels[seed] == [{"red", "blue"}] * 2
        assert halves_of(options, photos, photos) == ((photos, train), (photos, test))


def test_images_that_choose_are_not_asked_about(world, tmp_path):
    """Told by what they are, not by their names, which are the same in the folders of many sets."""
    said = "test_images: 8 of 8 looked at are images that choose latents"
    assert said in run(*call(world, tmp_path / "w.json", "--test-images", world / "photos", "--dry-run"), code=2)
    for path in (world / "photos").rglob("*.png"):
        other = tmp_path / "others" / path.relative_to(world / "photos")
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(other)
    run(*call(world, tmp_path / "w.json", "--test-images", tmp_path / "others", "--limit", 20, "--dry-run"))


def test_images_of_which_none_can_be_read_are_refused(world, tmp_path):
    shutil.copytree(world / "photos", tmp_path / "photos")
    for file in (tmp_path / "photos").rglob("*.png"):
        file.write_bytes(b"no picture")
    said = run(*call(world, tmp_path / "w.json", "--limit", 40, images=tmp_path / "photos"), code=2)
    assert "error: images: 0 for choosing can be read and have a label of images; 10 at least are needed" in said


@pytest.mark.parametrize("half", ["for choosing", "to ask about"])
def test_a_class_that_loses_all_its_images_is_refused(world, tmp_path, half):
    """By name and count, before anything is computed; of a class that keeps one the damaged ones are left out."""
    photos = tmp_path / "photos"
    shutil.copytree(world / "photos", photos)
    ids = [f"blue/{i}.png" for i in range(26)]
    (*others, last) = [name for name, first in zip(ids, halves(ids)) if first == (half == "for choosing")]
    for name in others:
        (photos / name).write_bytes(b"no picture")
    words = call(world, tmp_path / "w.json", "--limit", 14, "--dry-run", images=photos)
    assert f" {half} are not usable and were left out" in run(*words)
    (photos / last).write_bytes(b"no picture")
    argument = "images" if half == "for choosing" else "test_images"
    said = run(*words, code=2)
    assert f"error: {argument}: none of the {len(others) + 1} images {half} of the class 'blue' (images) is" in said
    assert "the first is blue/" in said


def test_classes_that_are_in_one_half_alone_are_refused(world, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(world / "photos", photos)
    for i in range(26):
        if halves([f"blue/{i}.png"])[0]:
            (photos / "blue" / f"{i}.png").unlink()
    n = len(list((photos / "blue").iterdir()))
    said = run(*call(world, tmp_path / "w.json", "--dry-run", images=photos), code=2)
    assert f"error: labels: class ['blue'] of images has {n} of --images, and none of them is in the half for" in said
    for i in range(11):
        shutil.copytree(world / "photos" / "red", photos / f"red{i}")
    said = run(*call(world, tmp_path / "w.json", "--limit", 10, "--dry-run", images=photos, labels="images"), code=2)
    assert "labels: class ['blue']" in said
    shutil.rmtree(photos / "blue")
    said = run(*call(world, tmp_path / "w.json", "--limit", 10, "--dry-run", images=photos), code=2)
    assert "error: limit: 10 images for choosing are fewer than the 12 classes of images; each class needs 1" in said


def test_finished_layers_are_taken_up(world, tmp_path, monkeypatch):
    from saevlm_fast.clip_steering import erasing

    output, done, work = tmp_path / "w.json", [], erasing.erase_words

    def stops(*given, **more):
        done.append(1)
        if len(done) == 2:
            raise Interrupted("interrupted")
        return work(*given, **more)

    monkeypatch.setattr(erasing, "erase_words", stops)
    both = call(world, output, "--limit", 10, sae="one,two", layer="2,3")
    with monkeypatch.context() as patch:
        patch.setattr(parts, "PARTS_VERSION", parts.PARTS_VERSION - 1)
        run(*both, code=130)
    done.clear()
    assert "is of another version of this program" in " ".join(run(*both, code=130).split())
    done.clear()
    done.append(1)  # the first is finished
    assert "interrupted; the same command goes on with the first SAE" in run(*both, code=130)
    assert not output.exists()
    monkeypatch.setattr(erasing, "erase_words", lambda *given, **more: done.append(1) or work(*given, **more))

    def killed(record):  # between the outputs and the settings
        raise Interrupted("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", killed)
        run(*both, code=130)
    assert len(done) == 3
    assert output.is_file()
    settings = output.with_name("w.json.settings.toml")
    assert not settings.exists()
    run(*both)
    assert len(done) == 3, "both SAEs are finished"
    assert settings.is_file()
    assert [path.name for path in tmp_path.iterdir() if "progress" in path.name] == []
    assert f"output: {output} already exists; --force replaces it" in run(*both, code=2)
    settings.unlink()  # nothing says that it was left half written
    assert f"output: {output} already exists; --force replaces it" in run(*both, code=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": "1,33"}, "k: 33, and as many others as a control, are more than {world}/one has: d_sae is 64"),
        ({"k": "0"}, "k: '0': each must be at least 1"),
        ({"layer": "1,2"}, "layer: 2 layers for 1 SAEs"),
        ({"layer": "7"}, "layer"),
        ({"images": "{world}/single"}, "labels: images has a single class, 'red'"),
        ({"labels": "{world}/places.csv:only"}, "labels: {world}/places.csv:only has a single class, 'same'"),
        ({"labels": "{world}/places.csv:none"}, "labels: {world}/places.csv has no column 'none', but place, only"),
        ({"labels": "colour"}, "labels: 'colour' is not images, scene:FACTOR or FILE.csv:COLUMN"),
        ({"labels": "scene:shape"}, "images: 'blue/0.png' is not the id of a scene"),
        ({"also": "images"}, "also: images is asked already"),
        ({"groups": "{world}/none.csv:place"}, "groups: {world}/none.csv is not a file"),
        ({"class_words": "{world}/half.csv"}, "class_words: {world}/half.csv has no line of the label ['blue']"),
        ({"class_words": "{world}/odd.csv"}, "class_words: {world}/odd.csv has the columns label, name; label and"),
        ({"class_words": "{world}/same.csv"}, "class_words: {world}/same.csv: the word ['rot'] is that of 2 labels"),
        ({"class_words": "{world}/none.csv"}, "class_words: {world}/none.csv is not a file"),
        ({"fonts": "{world}/words.csv"}, "fonts: {world}/words.csv cannot be used"),
        ({"class_words": "{world}/empty.csv"}, "class_words: {world}/empty.csv is empty"),
        ({"test_images": "{world}/none"}, "test_images: {world}/none"),
        (
            {"labels": "{world}/few.csv:place"},
            "images: 1 for choosing can be read and have a label of {world}/few.csv:place; 10",
        ),
        ({"class_words": "{world}/cyrillic.csv"}, "fonts: Pillow's bitmap font has no"),
        ({"select": "largest"}, "select: 'largest' is not one of"),
        ({"limit": "9"}, "limit"),
        ({"model": "hf:tiny-llava"}, "hf:tiny-llava: a llava model has no text side"),
        ({"output": "{tmp}/w.csv"}, "output: {tmp}/w.csv does not end in .json"),
    ],
)
def test_what_is_wrong_is_one_line(world, tmp_path, given, message):
    given = {"limit": "12"} | {key: each.format(world=world, tmp=tmp_path) for key, each in given.items()}
    output = given.pop("output", tmp_path / "w.json")
    text = run(*call(world, output, "--dry-run", **given), code=2)
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message.format(world=world, tmp=tmp_path) in last
    assert not list(tmp_path.iterdir())


def test_a_model_that_gives_no_numbers_is_named(world, tmp_path, monkeypatch):
    from saevlm_fast.measures.behaviour_splice import Splice

    original = Splice.original

    def broken(self, inputs):
        x_BTD, out_BE = original(self, inputs)
        return x_BTD, torch.full_like(out_BE, torch.nan)

    monkeypatch.setattr(Splice, "original", broken)
    text = run(*call(world, tmp_path / "w.json", "--limit", 12), code=2)
    assert "error: model: hf:tiny-clip gives NaN or inf for the image blue/" in text


def test_the_legend_of_one_layer_is_not_cut(tmp_path):
    figures = {"value": 0.5, "interval": [0.4, 0.6], "n": 9}
    removals = ("nothing", "latents", "random", "magnitude", "pca", "probe")
    layer = {"layer": 3, "sae": "s", "table": [{"removal": name, "k": 1, "clean": figures} for name in removals]}
    write_accuracy_picture(tmp_path / "w.svg", [layer], "words taken out")
    picture = ElementTree.parse(tmp_path / "w.svg").getroot()
    ends = {
        each.text: float(each.get("x")) + 6 * len(each.text) for each in picture.iter(f"{SVG}text") if each.get("x")
    }
    assert set(removals) <= set(ends)
    assert max(ends.values()) <= float(picture.get("width"))
