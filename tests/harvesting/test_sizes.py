"""What a harvest is counted to take on the disk beside its rows, and what it takes."""

import hashlib
from pathlib import Path

import pytest
from PIL import Image

import saevlm_fast as sf
from command import run_json
from saevlm_fast.harvesting import stores


@pytest.mark.parametrize(("tokens", "longest"), [("cls", 10), ("cls", 180), ("patches", 180)])
def test_items_and_index_are_counted_as_they_are(tmp_path, monkeypatch, tokens, longest):
    """Names that no compression makes short count as long as they are."""
    (tmp_path / "photos").mkdir()
    for number in range(60):
        name = "".join(hashlib.sha256(f"{number} {part}".encode()).hexdigest() for part in range(3))[:longest]
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "photos" / f"{name}.png")
    counted = []
    monkeypatch.setattr(stores, "check_room", lambda output, needed, what: counted.append(needed))
    given = {"layer": 3, "tokens": tokens, "images_per_shard": 8, "batch_size": 8, "max_skipped": 0.0}
    sf.harvest("hf:tiny-clip", tmp_path / "photos", output=tmp_path / "out", device="cpu", **given)
    files = [file for file in (tmp_path / "out").iterdir() if file.name != "harvest.json"]
    taken = sum(file.stat().st_size for file in files)
    beside = sum(file.stat().st_size for file in files if file.suffix != ".safetensors")
    assert beside > 60 * longest / 2, "or nothing is tested"
    assert counted[0] == pytest.approx(taken, abs=0.1 * beside + 4_000)
    words = ("--model", "hf:tiny-clip", "--images", tmp_path / "photos", "--layer", 3, "--tokens", tokens)
    more = ("--images-per-shard", 8, "--batch-size", 8, "--device", "cpu", "--output", tmp_path / "other", "--dry-run")
    assert run_json("harvest", *words, *more)["disk_bytes"] == counted[0]
    assert not Path(tmp_path / "other").exists()
