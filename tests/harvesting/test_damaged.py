"""harvest.json and the lists of skipped images with anything wrong: one line that names the file, or as it was."""

import json
from dataclasses import replace

import pytest

from damage import mutations, refusal
from saevlm_fast.config import HarvestOptions
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.harvesting.run import harvest
from saevlm_fast.harvesting.stores import HARVEST_FILE, check_output
from saevlm_fast.images.open import open_images
from saevlm_fast.inspection import inspect, verify_inspected
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint
from tiny_tower import save_clip, save_photos

CONFIG = HarvestConfig((HookPoint("residual", 0), HookPoint("projection")), (Tokens.parse("cls"),), batch_size=2)


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    """(images, tower, the options of a finished harvest with a skipped image)."""
    root = tmp_path_factory.mktemp("harvest")
    photos = save_photos(root / "photos", 6)
    (photos / "class_0" / "photo_000.png").write_bytes(b"no image")
    source, tower = open_images(str(photos)), load_tower(f"hf:{save_clip(root / 'clip')}")
    options = HarvestOptions(root / "out", workers=0, max_skipped=1, resume=True)
    harvest(source, tower, CONFIG, replace(options, resume=False))
    return source, tower, options


def test_a_harvest_json_with_anything_wrong_is_one_line_or_read(harvested):
    source, tower, options = harvested
    path = options.output / HARVEST_FILE
    text, refused, read = path.read_text(), 0, 0
    files = {file: file.read_bytes() for file in options.output.rglob("*") if file.is_file()}
    readers = [
        lambda output: verify_inspected(inspect(output)),
        lambda output: check_output(replace(options, resume=False, force=True)),
    ]
    for number, damaged in enumerate(mutations(text, 3)):
        path.write_bytes(damaged)
        refused += sum(refusal(reader, options.output) is not None for reader in readers)
        if number % 12 == 0:  # the tower takes a while
            said = refusal(lambda _: harvest(source, tower, CONFIG, options), options.output, named=False)
            read += said is None
            assert said is None or str(path) in said or said.startswith("resume: ")
    path.write_text(text)
    assert refused > 30
    assert read > 1  # versions may differ
    assert {file: file.read_bytes() for file in options.output.rglob("*") if file.is_file()} == files
    assert all(refusal(reader, options.output) is None for reader in readers)


def test_every_altered_byte_of_harvest_json_is_an_error(harvested):
    _, _, options = harvested
    path = options.output / HARVEST_FILE
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        assert refusal(lambda output: verify_inspected(inspect(output)), path)
    path.write_bytes(whole)


@pytest.mark.parametrize("lines", ["", "no JSON\n", "[]\n", '{"image": 3}\n', "\xff\n", "null\n" * 3])
def test_a_list_of_skipped_images_with_anything_wrong(harvested, tmp_path, lines):
    """Of a harvest that was interrupted. What counts is how many lines it has."""
    source, tower, options = harvested
    options = replace(options, output=tmp_path / "out", resume=False)
    harvest(source, tower, CONFIG, options)
    (tmp_path / "out" / "skipped.jsonl").unlink()
    for index in (tmp_path / "out").rglob("index.json"):
        record = {name: value for name, value in json.loads(index.read_text()).items() if name != "sha256"}
        index.write_text(json.dumps(record | {"complete": False}))
    (tmp_path / "out" / "skipped-00000.jsonl").write_bytes(lines.encode("latin-1"))
    said = refusal(
        lambda _: harvest(source, tower, CONFIG, replace(options, resume=True, max_skipped=0)), tmp_path, named=False
    )
    assert (said is None) == (lines == "")
    assert said is None or said.startswith(("max_skipped: ", str(tmp_path / "out" / "skipped-00000.jsonl")))
