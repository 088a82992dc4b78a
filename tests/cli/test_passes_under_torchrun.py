"""`torchrun -m saevlm_fast.cli evaluate` and `harvest --sae`: real processes over gloo give what one process gives."""

import json

import pytest
from torchrun import Torchrun, messages

from command import run
from saevlm_fast.data.codes import open_codes
from tiny_tower import save_photos

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Photos, their tokens and embeddings by tiny-clip, and an SAE of the tokens."""
    path = tmp_path_factory.mktemp("world")
    save_photos(path / "photos", 24)
    (path / "prompts.json").write_text('{"class_0": "red", "class_1": "blue", "class_2": ["green", "navy"]}')
    harvest = ("harvest", "--model", "hf:tiny-clip", "--images", path / "photos", "--workers", 0, "--device", "cpu")
    run(*harvest, "--layer", 1, "--tokens", "all", "--output", path / "tokens")
    run(*harvest, "--point", "projection", "--output", path / "embeddings")
    few = ("--d-sae", 16, "--k", 4, "--steps", 20, "--batch-size", 64, "--device", "cpu")
    run("train", "--activations", path / "tokens", *few, "--output", path / "sae")
    return path


def numbers(value, where=""):
    if isinstance(value, dict):
        for key, each in value.items():
            yield from numbers(each, f"{where}/{key}")
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from numbers(each, f"{where}/{i}")
    else:
        yield where, value


def evaluate_words(world, output):
    return [
        *("evaluate", "--sae", world / "sae", "--activations", world / "tokens", "--batch-size", 100),
        *("--embeddings", world / "embeddings", "--controls", "raw,kmeans", "--device", "cpu", "--output", output),
        *("--model", "hf:tiny-clip", "--images", world / "photos", "--image-batch-size", 5),
        *("--class-prompts", world / "prompts.json"),
    ]


def test_the_evaluation_of_one_process(world, tmp_path):
    run(*evaluate_words(world, tmp_path / "alone"))
    with Torchrun(evaluate_words(world, tmp_path / "shared"), 3, tmp_path / "log") as ranks:
        code, said = ranks.end()
    assert code == 0, said
    assert said.count("wrote") == 1  # one rank speaks
    found, expected = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("shared", "alone"))
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )
    names = {measure for subject in found["subjects"] for measure in subject["measures"]}
    assert {"reconstruction", "monosemanticity", "behaviour", "kept"} <= names
    for (place, mine), (also, its) in zip(numbers(found), numbers(expected), strict=True):
        assert place == also
        assert mine == (pytest.approx(its, rel=1e-4, abs=1e-5) if isinstance(its, float) else its), place


def test_an_evaluation_that_is_there_is_one_message(world, tmp_path):
    (tmp_path / "out" / "parts").mkdir(parents=True)
    with Torchrun(evaluate_words(world, tmp_path / "out"), 2, tmp_path / "log") as ranks:
        _, said = ranks.end()
    (message,) = messages(said)
    assert "already holds an evaluation; use --resume" in message
    assert "exitcode  : 2" in said


def test_ranks_harvest_codes(world, tmp_path):
    """Shards are those of one process: units of images do not depend on who does them."""
    words = [
        *("harvest", "--model", "hf:tiny-clip", "--images", world / "photos", "--layer", 1, "--tokens", "all"),
        *(
            "--sae",
            world / "sae",
            "--pool",
            "mean",
            "--images-per-shard",
            5,
            "--batch-size",
            5,
            "--workers",
            0,
            "--device",
            "cpu",
        ),
    ]
    run(*words, "--output", tmp_path / "alone")
    with Torchrun([*words, "--output", tmp_path / "shared"], 2, tmp_path / "log") as ranks:
        code, said = ranks.end()
    assert code == 0, said
    assert said.count("wrote") == 1
    (found,), (expected,) = ([*(tmp_path / name).rglob("index.json")] for name in ("shared", "alone"))
    mine, its = open_codes(found.parent), open_codes(expected.parent)
    assert mine.n_rows == its.n_rows == 24
    mine.check_whole()
    shards = [[shard["sha256"] for shard in json.loads(file.read_text())["shards"]] for file in (found, expected)]
    assert len(shards[0]) == 5
    assert shards[0] == shards[1]
