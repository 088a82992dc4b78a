"""A refusal begins with the name of the option, also where what refuses knows the model or the file alone."""

import pytest
import torch

from command import run
from saevlm_fast.cli.options import named_by_option
from saevlm_fast.cli.steerability import SteerabilityArguments
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.images.open import open_images
from saevlm_fast.sae import SparseAutoencoder
from small_world import CALLS, LAYER, spelled
from tiny_tower import save_photos

TEXT_SIDE = {"hf:no such": "no directory no such", "hf:{world}/photos": "config.json is missing"}
TEXT_SIDE |= {
    "hf:tiny-llava": "a llava model has no text side",
    "clip:x": "'clip:x' is not hf:NAME_OR_DIR or open_clip:",
}
TOWER = {
    "hf:no such": "no directory no such",
    "hf:{world}/photos": "config.json is missing",
    "x": "'x' is not one of hf:",
}
LLAVA = {"hf:no such": "no directory no such", "hf:tiny-clip": "no model that reads images and answers in text"}
SAE = {"{world}/none": "no such file", "{world}/cut": "cut"}
IMAGES = {"{world}/none": "no such file or folder", "{world}/run": "no image among"}
BARE_WORD = {"nope": "no such file"}
NO_FILE = {"{world}/none": "no such file"}
CASES = {
    "harvest": {"model": TOWER, "images": IMAGES},
    "steerability": {"model": TEXT_SIDE, "text_model": TEXT_SIDE, "sae": SAE, "images": IMAGES},
    "erase": {"model": TEXT_SIDE, "sae": SAE, "images": IMAGES, "test_images": IMAGES},
    "cross-modal": {"clip": TEXT_SIDE, "sae": SAE, "activations": NO_FILE, "images": IMAGES},
    "steer": {"model": LLAVA, "sae": SAE},
    "steering-score": {"model": LLAVA, "sae": SAE, "codes": {"{world}/none": "no index.json"}, "images": IMAGES},
    "evaluate": {"model": TOWER, "sae": SAE | BARE_WORD, "activations": NO_FILE, "images": IMAGES},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What CALLS of these commands name, as far as they get."""
    root = tmp_path_factory.mktemp("world")
    save_photos(root / "photos", 12)
    sae = SparseAutoencoder(SAEConfig(128, 16, 4, "topk"))
    for name in ("run", "language", "cut"):
        sae.save_pretrained(root / name)
    weights = root / "cut" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    x_ND = torch.randn(12, 128)
    ids = [str(path.relative_to(root / "photos")) for path in sorted((root / "photos").rglob("*.png"))]
    items = {"image": ids, "token": [0] * 12}
    for name, point in (("store", "residual"), ("embeddings", "projection")):
        with ActivationWriter(root / name, 128, torch.float32, {"point": point, "layer": 1}) as writer:
            writer.append(x_ND, items)
    scenes = open_images("scenes:test:12")
    items |= {
        "image": [scenes.image_id(i) for i in range(12)],
        "modality": ["text", "image"] * 6,
        "token_id": [1] * 12,
        "text": ["a"] * 12,
    }
    source = {"point": "language", "layer": 1, "images": {"path": "scenes:test:12"}}
    with ActivationWriter(root / "pairs", 128, torch.float32, source) as writer:
        writer.append(x_ND, items)
    (root / "words.txt").write_text("red\nblue\n")
    (root / "prompts.json").write_text('{"class_0": "red", "class_1": "blue", "class_2": "navy"}')
    codes = ("harvest", "--model", "hf:tiny-llava", "--images", root / "photos", "--layer", LAYER, "--tokens", "all")
    codes += ("--sae", root / "run", "--pool", "mean", "--workers", 0, "--device", "cpu")
    run(*codes, "--output", root / "codes")
    return root


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in CASES.items() for option in options])
def test_the_option_is_named_first(world, tmp_path, name, option, monkeypatch):
    monkeypatch.chdir(world)
    for bad, said in CASES[name][option].items():
        given = CALLS[name] | {f"--{option.replace('_', '-')}": bad.format(world=world)}
        given |= {"--output": str(tmp_path / "out.json")} if "--output" in given else {}
        given |= {"--clip": "hf:tiny-clip"} if name == "cross-modal" and option == "images" else {}
        last = run(name, *spelled(given), "--dry-run", code=2).strip().splitlines()[-1]
        assert last.startswith(f"error: {option}: "), last
        assert said in last
        assert last.count(f"{option}: ") == 1


def test_what_a_message_begins_with_is_compared_with_places_alone(tmp_path):
    options = SteerabilityArguments(
        model="hf:a/b",
        sae=(tmp_path / "one", tmp_path / "one-more"),
        layer=2,
        images="words",
        output=tmp_path / "a.csv",
    )
    for message, expected in (
        ("hf:a/b: no directory", "model: hf:a/b: no directory"),
        ("hf:a/bc: no directory", "hf:a/bc: no directory"),
        (f"{tmp_path}/one-more/cfg.json: damaged", f"sae: {tmp_path}/one-more/cfg.json: damaged"),
        ("words: a.txt is not a file", "words: a.txt is not a file"),  # an option, though images has that value
        ("layer: 2 of hf:a/b is not read", "layer: 2 of hf:a/b is not read"),
    ):
        with pytest.raises(ValueError, match=r":") as refused, named_by_option(options):
            raise ValueError(message)
        assert str(refused.value) == expected


@pytest.mark.parametrize("bad", ["x" * 260, "/tmp/" + "ü" * 130, "a/" * 3000])
@pytest.mark.parametrize(
    ("call", "option"),
    [
        (("train", "--activations", "store", "--output"), "output"),
        (("train", "--output", "out", "--activations"), "activations"),
        (("evaluate", "--activations", "store", "--output", "out", "--sae"), "sae"),
        (("report", "--activations", "store", "--output", "out", "--sae"), "sae"),
        (("inspect",), "path"),
    ],
)
def test_a_path_that_no_disk_takes_is_its_options(world, monkeypatch, call, option, bad):
    monkeypatch.chdir(world)
    last = run(*call, bad, code=2).strip().splitlines()[-1]
    assert last.startswith(f"error: {option}: {bad[:40]}... is too long: "), last
    assert last.endswith("a path may have 4,095, and a name 255")
