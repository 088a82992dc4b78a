"""`saevlm-fast steerability` from the command line: its tables, several SAEs, going on, and what it refuses."""

import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from command import run, run_json
from saevlm_fast.cli.record import Record
from saevlm_fast.cli.steerability import SteerabilityArguments
from saevlm_fast.clip_steering.run import progress_of
from saevlm_fast.clip_steering.steerability import Steering
from saevlm_fast.config import SAEConfig
from saevlm_fast.errors import Interrupted
from saevlm_fast.outputs import begin_writing
from saevlm_fast.sae import SparseAutoencoder

D_SAE = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two SAEs of tiny-clip's width, one of another width, one that is damaged, and words."""
    root = tmp_path_factory.mktemp("world")
    for name, d_in, seed in (("one", 128, 0), ("two", 128, 1), ("narrow", 64, 2)):
        torch.manual_seed(seed)
        SparseAutoencoder(SAEConfig(d_in, D_SAE, 6, "topk")).save_pretrained(root / name)
    shutil.copytree(root / "one", root / "nan")
    weights = load_file(root / "nan" / "sae_weights.safetensors")
    weights["W_enc"][3, 3] = float("nan")
    save_file(weights, root / "nan" / "sae_weights.safetensors")
    (root / "words.txt").write_text("red\nblue\nstar\n")
    (root / "none.txt").write_text("\n")
    (root / "single.txt").write_text("red\nzebra\n")
    return root


def call(world, output, *more, sae="one"):
    saes = ",".join(str(world / name) for name in sae.split(","))
    words = ("--images", "scenes:test:5", "--words", world / "words.txt", "--template", "a {} thing", "--ask", 2)
    return ("steerability", "--model", "hf:tiny-clip", "--sae", saes, "--layer", 2, *words, "--device", "cpu",
            "--output", output, *more)  # fmt: skip


def test_several_saes_are_one_table(world, tmp_path):
    output, few = tmp_path / "s.parquet", ("--controls", 3, "--no-neurons", "--latents", "0:36")
    found = run_json(*call(world, output, *few, sae="one,two"))
    table = pq.read_table(output)
    assert table["sae"].to_pylist() == [str(world / name) for name in ("one", "two") for _ in range(36)]
    alone = run_json(*call(world, tmp_path / "two.json", *few, sae="two"))
    assert "sae" not in json.loads((tmp_path / "two.json").read_text())["latents"][0]
    assert found["saes"][1] == {"sae": str(world / "two"), **alone["of_latents"]}
    shares = [each["steerable"]["value"] for each in found["saes"]]
    assert found["of_latents"]["steerable"]["value"] == pytest.approx(sum(shares) / 2)
    assert found["of_latents"]["shared"]["words"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "s.parquet", "s.parquet.settings.toml", "two.json", "two.json.settings.toml",
    ]  # fmt: skip


def test_what_is_finished_is_taken_up(world, tmp_path, monkeypatch):
    """Interrupted at the second SAE, the first one's blocks are not asked about again."""
    output, done = tmp_path / "s.parquet", []
    changes = Steering.changes

    def stops(self, units_J, target_J):
        if len(done) == 1:
            raise Interrupted("interrupted after 8 of 8 latents")
        done.append(len(units_J))
        return changes(self, units_J, target_J)

    monkeypatch.setattr(Steering, "changes", stops)
    more = ("--no-neurons", "--latents", "0:8")
    said = run(*call(world, output, *more, sae="one,two"), code=130)
    assert said.endswith("interrupted after 8 of 8 latents; the same command goes on where it stopped\n")
    assert not output.exists()
    monkeypatch.setattr(Steering, "changes", lambda *given: done.append(1) or changes(*given))
    run(*call(world, output, *more, sae="one,two"))
    assert len(done) == 2  # one block before, one after
    assert len(pq.read_table(output)) == 16
    assert "exists" in run(*call(world, output, *more), code=2)
    run(*call(world, output, *more, "--force"))
    assert len(pq.read_table(output)) == 8


def test_what_was_killed_between_its_outputs_goes_on_and_what_is_whole_is_kept(world, tmp_path, monkeypatch):
    output, more = tmp_path / "s.parquet", ("--latents", "0:8", "--screen", 8)

    def killed(record):
        raise Interrupted("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", killed)
        run(*call(world, output, *more), code=130)
    assert {"s.parquet", "s.neurons.parquet", "s.parquet.progress"} <= {path.name for path in tmp_path.iterdir()}
    run(*call(world, output, *more, "--dry-run"))
    changes, done = Steering.changes, []
    monkeypatch.setattr(Steering, "changes", lambda *given: done.append(1) or changes(*given))
    run(*call(world, output, *more))
    assert done == [], "all of it was measured"
    assert not (tmp_path / "s.parquet.progress").exists()
    assert f"output: {output} already exists; --force replaces it" in run(*call(world, output, *more), code=2)


def test_a_kill_beside_a_whole_output_does_not_replace_it(world, tmp_path):
    """As of a call with --force: the old settings are there until the new ones are."""
    output = tmp_path / "s.parquet"
    begin_writing(options_of(output).files, progress_of(output), force=False)
    output.with_name("s.parquet.settings.toml").touch()
    assert "s.parquet.settings.toml already exists" in run(*call(world, output), code=2)
    shutil.rmtree(progress_of(output))
    output.with_name("s.parquet.settings.toml").unlink()
    output.touch()
    assert "s.parquet already exists" in run(*call(world, output), code=2)


def options_of(output):
    return SteerabilityArguments(model="m", sae=(output,), layer=2, images="i", output=output)


def test_a_killed_call_without_neurons_does_not_replace_anothers_neurons(world, tmp_path):
    """Nor anything that came between the beginning of a call and its end."""
    output = tmp_path / "s.parquet"
    begin_writing(replace(options_of(output), neurons=False).files, progress_of(output), force=False)
    output.touch()
    neurons = tmp_path / "s.neurons.parquet"
    neurons.write_text("mine")
    assert "s.neurons.parquet already exists; --force replaces it" in run(*call(world, output), code=2)
    run(*call(world, output, "--no-neurons", "--latents", "0:8", "--screen", 1))
    assert len(pq.read_table(output)) == 8
    assert neurons.read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "sae", "message"),
    [
        ((), "narrow", "d_in of {world}/narrow is 64, but the blocks of hf:tiny-clip have width 128"),
        ((), "one,one", "sae: {world}/one is listed twice"),
        ((), "nan", "error: sae: {world}/nan"),
        (("--layer", 5), "one", "layer"),
        (("--alpha", 0), "one", "alpha: 0.0 must be positive"),
        (("--tokens", "mean"), "one", "tokens: 'mean' is not one of"),
        (("--latents", "0:41"), "one", "latents: '0:41' goes beyond the last of 40"),
        (("--latents", "top:3"), "one", "latents: 'top:3': no order yet"),
        (("--words", "{world}/none.txt"), "one", "words: {world}/none.txt"),
        (("--words", "{world}/single.txt"), "one", "words: hf:tiny-clip knows 1 of 2; at least 2 are needed"),
        (("--words", "{world}/missing.txt"), "one", "words: {world}/missing.txt"),
        (("--template", "no place"), "one", "template: 'no place'"),
        (("--images", "scenes:test:0"), "one", "images: "),
        (("--model", "hf:tiny-llava"), "one", "hf:tiny-llava: a llava model has no text side"),
    ],
)
def test_what_is_wrong_is_one_line(world, tmp_path, more, sae, message):
    more = [str(each).format(world=world) for each in more]
    text = run(*call(world, tmp_path / "s.parquet", *more, sae=sae), code=2)
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message.format(world=world) in last
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_by_a_dry_run(world, tmp_path):
    text = run(*call(world, tmp_path / "s.parquet", "--dry-run", sae="one,two"))
    assert "latents              80" in text
    assert not list(tmp_path.iterdir())


def test_the_neurons_lie_beside_the_latents(world, tmp_path):
    options = SteerabilityArguments(
        model="hf:tiny-clip", sae=(world / "one",), layer=2, images="scenes:test:2", output=tmp_path / "a.csv"
    )
    assert options.neurons_output == tmp_path / "a.neurons.csv"
    shutil.rmtree(tmp_path)


def test_latents_for_which_the_model_gives_no_number(world, tmp_path):
    """They have no S, no word and no chance, which is said; a unit that never fires is not asked about."""
    output = tmp_path / "s.json"
    found = run(*call(world, output, "--no-neurons", "--latents", "0:4", "--alpha", 1e30))
    rows = json.loads(output.read_text())["latents"]
    lost = [row for row in rows if row["status"] == "no number"]
    assert lost
    assert {(row["s"], row["chance"], row["concept"]) for row in lost} == {(None, None, None)}
    assert f"warning: alpha: {len(lost)} of 4 latents have no S, for the model gives NaN or inf" in found


def test_saes_of_another_tower_or_layer(world, tmp_path):
    """What the SAE says that it was trained on is compared with the model: another layer is refused."""
    model = {"spec": "hf:other", "class": "CLIPVisionModelWithProjection", "weights_sha256": "0" * 64}
    source = {"point": "residual", "layer": 2, "tokens": "all", "model": model}
    for name, layer in (("other", 2), ("above", 3)):
        sae = SparseAutoencoder(SAEConfig(128, D_SAE, 6, "topk", metadata={"source": source | {"layer": layer}}))
        sae.save_pretrained(tmp_path / name)
    few = ("--no-neurons", "--latents", "0:2", "--dry-run")
    said = run(*call(tmp_path, tmp_path / "s.json", "--words", world / "words.txt", *few, sae="other"))
    assert f"warning: sae: {tmp_path}/other was trained on residual of layer 2, tokens all of another model" in said
    said = run(*call(tmp_path, tmp_path / "s.json", "--words", world / "words.txt", *few, sae="other,above"), code=2)
    assert f"error: layer: 2, but {tmp_path}/above was trained on residual of layer 3" in said


def test_too_few_random_directions_are_told_before_the_work(world, tmp_path):
    few = "latents: 3 x 1 random directions are too few to call one steerable, which takes 99: --controls 33"
    text = run(*call(world, tmp_path / "out.parquet", "--screen", 3))
    assert few in text
    assert text.index(few) < text.index("wrote")
    dry = run(*call(world, tmp_path / "dry.parquet", "--screen", 3, "--dry-run"))
    assert few.removeprefix("latents: ") in " ".join(dry.split())
    assert "too few" not in run(*call(world, tmp_path / "more.parquet", "--screen", 3, "--controls", 33))
