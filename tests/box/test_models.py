"""The models in the box are what was shipped, or a clear error."""

import shutil
from pathlib import Path

import pytest

from saevlm_fast.box import models
from saevlm_fast.towers.load import load_tower


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(models.ASSETS, tmp_path / "assets")
    monkeypatch.setattr(models, "ASSETS", tmp_path / "assets")
    return tmp_path / "assets"


@pytest.mark.parametrize("name", models.MODELS)
def test_the_shipped_models_are_sound(name: str) -> None:
    directory = models.model_directory(name)
    assert (directory / "config.json").is_file()
    assert (directory / "README.md").is_file()


def test_all_of_the_box_fits_in_15_megabytes() -> None:
    files = [file for file in models.ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 15_000_000


def test_every_file_of_the_models_is_listed() -> None:
    files = {file.relative_to(models.ASSETS).as_posix() for file in models.ASSETS.glob("*/**/*") if file.is_file()}
    assert files == set(models._read_checksums())


def test_one_flipped_bit_is_found(copied: Path) -> None:
    weights = copied / "tiny-clip" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"^tiny-clip: .*model\.safetensors is damaged: its SHA-256 is"):
        models.model_directory("tiny-clip")
    with pytest.raises(ValueError, match=r"hf:tiny-clip: .*model\.safetensors is damaged"):
        load_tower("hf:tiny-clip")


def test_truncated_and_missing_files_are_found(copied: Path) -> None:
    weights = copied / "tiny-llava" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        models.model_directory("tiny-llava")
    weights.unlink()
    with pytest.raises(ValueError, match=r"^tiny-llava: .*model\.safetensors is missing; install saevlm-fast again$"):
        models.model_directory("tiny-llava")
    assert models.model_directory("tiny-clip").is_dir()  # the other one is as it was


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"SHA256SUMS is missing"),
        ("nonsense\n", r"SHA256SUMS is damaged"),
        ("", r"does not list it"),
        ("0" * 64 + "  tiny-clip/config.json\n", r"does not list tiny-clip/README\.md; install saevlm-fast again"),
        ("\x00\xff", r"SHA256SUMS is damaged"),
    ],
)
def test_a_damaged_list_is_no_permission(copied: Path, content: str | None, message: str) -> None:
    (copied / models.CHECKSUMS).unlink()
    if content is not None:
        (copied / models.CHECKSUMS).write_text(content)
    with pytest.raises(ValueError, match=message):
        models.model_directory("tiny-clip")


def test_other_names_are_not_in_the_box() -> None:
    with pytest.raises(ValueError, match=r"^model: 'gpt' is not one of tiny-clip, tiny-llava$"):
        models.model_directory("gpt")


def test_a_directory_of_that_name_is_not_the_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-clip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_tower("hf:tiny-clip").description()["blocks"] == 5
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_tower("hf:./tiny-clip")
