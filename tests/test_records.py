"""Sealed records, and every JSON file of ours with something wrong in it: one line that says what, or what it meant."""

import json
import re
from pathlib import Path

import pytest
import torch

from campaign import build
from command import run as command
from damage import edit_record, mutations, refusal
from saevlm_fast.cli.inspect_table import summary_rows
from saevlm_fast.cli.names import COMMANDS, called
from saevlm_fast.cli.options import named_by_option
from saevlm_fast.data.codes import open_codes
from saevlm_fast.data.matrix import map_matrix
from saevlm_fast.data.rows import open_activations
from saevlm_fast.errors import ActivationError, OtherSettings
from saevlm_fast.inspection import inspect
from saevlm_fast.records import (
    DIGEST,
    FILE_NAME,
    TEXT,
    Each,
    Fields,
    check_same_settings,
    read_record,
    whole,
    write_record,
)
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.settings import settings_of
from saevlm_fast.training.saved_state import check_checkpoint

SCHEMA = Fields({"a": whole(1, 9), "b": Each(Fields({"c": TEXT}))}, {"d": DIGEST, "e": FILE_NAME}, others=False)
GOOD = {"a": 1, "b": [{"c": "x"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": 0}, "a is 0; a whole number from 1 to 9 is needed"),
        ({"a": True}, "a is True; a whole number"),
        ({"a": 1.0}, "a is 1.0; a whole number"),
        ({"b": {}}, "b is an object of 0 entries; a list is needed"),
        ({"b": [{"c": "x"}, {"c": None}]}, "b[1].c is None; a string is needed"),
        ({"b": [{}]}, "b[0].c is missing"),
        ({"d": "x"}, "d is 'x'; a SHA-256 of 64 hexadecimal digits is needed"),
        ({"e": "../x"}, "e is '../x'; the name of a file in the same directory is needed"),
        ({"e": ".."}, "e is '..'"),
        ({"f": 1}, "'f' is not an entry of it"),
        ({"a": "\N{ESCAPE}[31m" + "9" * 100}, "a is '\\x1b[31m999"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ActivationError) as caught:
        read_record(path, SCHEMA, ActivationError)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert len(str(caught.value)) < 200 + len(str(path))


NO_RECORDS = ["[" * 100_000, '{"a":' * 5000, '{"a": 1e400}', '{"a": NaN}', '{"a": ' + "9" * 5000 + "}", "", "[1]"]


@pytest.mark.parametrize("text", [*NO_RECORDS, b"\xff\xfe{}"])
def test_what_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"a\.json: (not valid JSON|nested more|it holds)") as caught:
        read_record(path, Fields())
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        read_record(tmp_path, Fields())


def test_every_altered_byte_of_a_sealed_record_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, GOOD)
    assert read_record(path, SCHEMA) == GOOD
    sealed = path.read_bytes()
    for position in range(len(sealed)):
        for bit in range(8):
            altered = bytearray(sealed)
            altered[position] ^= 1 << bit
            path.write_bytes(altered)
            with pytest.raises(ValueError, match=r"a\.json: "):
                read_record(path, SCHEMA)


# Real files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    build(root)
    return root


def described(path):
    return summary_rows(inspect(path))


@pytest.mark.parametrize(
    ("file", "readers"),
    [
        ("sae/cfg.json", [SparseAutoencoder.from_pretrained, described]),
        ("store/index.json", [lambda path: open_activations(path).rows(torch.arange(5)), described]),
        ("codes/index.json", [lambda path: list(open_codes(path).chunks(40)), described]),
        ("run/run.json", [described]),
        ("run/checkpoints/step_00000006/checkpoint.json", [check_checkpoint]),
    ],
)
def test_a_record_with_anything_wrong_is_one_line_or_read(built, file, readers):
    path = built / file
    text = path.read_text()
    refused = 0
    try:
        for damaged in mutations(text, file):
            path.write_bytes(damaged)
            refused += sum(refusal(read, path.parent) is not None for read in readers)
    finally:
        path.write_text(text)
    assert refused > 30
    assert not any(refusal(read, path.parent) for read in readers)


def with_header(file, damaged):
    """The bytes of a safetensors file with another header."""
    size = int.from_bytes(file[:8], "little")
    return len(damaged).to_bytes(8, "little") + damaged + file[8 + size :]


def header_of(file):
    return file[8 : 8 + int.from_bytes(file[:8], "little")].decode()


def test_a_safetensors_header_with_anything_wrong_is_one_line_or_read(built, tmp_path):
    matrix, path = (built / "store" / "shard-00000.safetensors").read_bytes(), tmp_path / "x.safetensors"
    for damaged in mutations(header_of(matrix), 0):
        path.write_bytes(with_header(matrix, damaged))
        for read in (map_matrix, described):
            refusal(read, path)
    SparseAutoencoder.from_pretrained(built / "sae").save_pretrained(tmp_path / "sae")
    edit_record(tmp_path / "sae" / "cfg.json")  # without the digest of the weights
    weights = tmp_path / "sae" / "sae_weights.safetensors"
    good = weights.read_bytes()
    for damaged in mutations(header_of(good), 1):
        weights.write_bytes(with_header(good, damaged))
        for read in (SparseAutoencoder.from_pretrained, described):
            refusal(read, tmp_path / "sae")


def test_altered_files_end_the_commands_by_name(built, tmp_path):
    """train and ms-score read every shard."""
    shard, store = built / "store" / "shard-00001.safetensors", built / "store"
    good = shard.read_bytes()
    altered = bytearray(good)
    altered[-3] ^= 1  # still a number
    shard.write_bytes(altered)
    training = ("train", "--activations", store, "--d-sae", 16, "--k", 2, "--steps", 2, "--output", tmp_path / "run")
    scoring = ("ms-score", "--raw", "--activations", store, "--embeddings", store, "--output", tmp_path / "m.parquet")
    try:
        for words in (training, scoring):
            said = " ".join(command(*words, code=2).split())
            assert "shard-00001.safetensors: altered, its SHA-256 is not the one in the store's index" in said
        assert not (tmp_path / "m.parquet").exists()
        assert not (tmp_path / "run").exists()
    finally:
        shard.write_bytes(good)


NEEDED = {
    "train": {"activations": Path("a"), "steps": 4, "output": Path("out")},
    "harvest": {"model": "hf:a", "images": "b", "output": Path("out")},
}


@pytest.mark.parametrize(
    ("name", "given", "section", "setting", "said"),
    [
        ("train", {"expansion": 4.0}, "sae", "d_sae", "d_sae (--expansion)"),
        ("train", {}, "sae", "d_sae", "d_sae (--expansion)"),
        ("train", {"d_sae": 16}, "sae", "d_sae", "d_sae"),
        ("train", {}, "sae", "group_sizes", "group_sizes (--groups)"),
        ("train", {}, "sae", "d_in", "d_in (--activations)"),
        ("train", {}, "train", "warmup_steps", "warmup_steps (--warmup)"),
        ("train", {}, "train", "clip_norm", "clip_norm"),
        ("train", {}, "data", "rows", "rows (--activations)"),
        ("harvest", {"layer": (1,)}, "harvest", "points", "points (--point, --layer)"),
        ("harvest", {"layer": (1,)}, "model", "weights_sha256", "weights_sha256 (--model, --random-weights)"),
        ("harvest", {"layer": (1,), "limit": 9}, "images", "images", "images (--images, --limit)"),
        ("harvest", {"layer": (1,)}, "images", "images", "images"),
    ],
)
def test_a_setting_of_a_run_is_called_by_its_option(name, given, section, setting, said):
    options = COMMANDS[name].options.of(NEEDED[name] | given)
    assert called(options, section, setting) == said
    with pytest.raises(ValueError, match=rf"^resume: {re.escape(said)} is 2, but .* with 1$"), named_by_option(options):
        raise OtherSettings([(section, setting, 2, 1)])


def test_what_a_setting_follows_from_are_options():
    kinds = [each.options for each in COMMANDS.values()]
    found = [(kind, follows) for kind in kinds for follows in kind.made_from.values()]
    assert len(found) > 10
    for kind, follows in found:
        assert set(follows) <= set(settings_of(kind)), kind


def test_of_lists_what_differs_is_named():
    for value, before, told in (
        ([1, 2], [1, 2, 3, 4], "the 2 others alone, but the run was started with 3, 4 and 2 others"),
        (["a", "b"], ["a", "c"], "b and 1 other, but the run was started with c and 1 other"),
        ([1, 2], [2, 1], "[1, 2], but the run was started with [2, 1]"),
        ([1], [2], "[1], but the run was started with [2]"),
    ):
        assert str(OtherSettings([("harvest", "stores", value, before)])) == f"resume: stores is {told}"


def test_every_setting_that_differs_from_a_runs_is_named(tmp_path):
    started = {"sae": {"d_sae": 16, "k": 2, "groups": [1]}, "config": {"steps": 3, "lr": 0.1, "seed": 0}}
    write_record(tmp_path / "run.json", started)
    check_same_settings(tmp_path / "run.json", started)
    changed = {"sae": started["sae"] | {"d_sae": 64, "k": 7}, "config": started["config"]}
    with pytest.raises(ValueError, match=r"^resume: d_sae is 64, but .* with 16; also different: k \(7, not 2\)$"):
        check_same_settings(tmp_path / "run.json", changed)
    with pytest.raises(ValueError, match=r"^resume: k is 7, but the run was started with 2$"):
        check_same_settings(tmp_path / "run.json", changed, free=("d_sae",))
    all_of_them = {section: dict.fromkeys(values, "x") for section, values in started.items()}
    with pytest.raises(ValueError, match=r"k \(x, not 2\), groups \(x, not \[1\]\), steps \(x, not 3\) and 2 more$"):
        check_same_settings(tmp_path / "run.json", all_of_them)
