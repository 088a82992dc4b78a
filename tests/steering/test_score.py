"""The steering score against a plain loop; resumed; what it says."""

import json
import math
import re
import shutil
from copy import deepcopy

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_harvests import dense_codes
from steering_scores import ALPHA, DEAD, LAYER, N_IMAGES, score_command, score_words

from command import run_json
from damage import edit_record
from saevlm_fast.cli.steering_score import _print_scores
from saevlm_fast.config import PROMPT, ScoreConfig, ScoreRun
from saevlm_fast.data.codes import open_codes
from saevlm_fast.errors import Interrupted
from saevlm_fast.images.open import open_images
from saevlm_fast.steering.answers import SteeredAnswers
from saevlm_fast.steering.edits import clamp, steer
from saevlm_fast.steering.score import _Scorer, firing_latents, steering_score
from saevlm_fast.steering.score import _settings as steering_score_settings
from saevlm_fast.steering.table import CONDITIONS, MEASURES, SteeringScores, read_scores, write_block
from saevlm_fast.towers.text import load_llava


def test_latents_that_fire_anywhere(box):
    codes = open_codes(box / "codes")
    firing = firing_latents(codes, batch_rows=9).tolist()
    assert firing == dense_codes(codes).any(0).nonzero().flatten().tolist()
    assert DEAD not in firing


@torch.no_grad()
def plain_score(pieces, latent, edits, images):
    """One answer at a time, through the hooks, embedded and compared by hand; edits None: no SAE."""
    answerer, _, codes, embeddings, encoder = pieces
    llava, processor, sae = answerer.model, answerer.processor, answerer.sae
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    cosines = []
    activations = dense_codes(codes)[:, latent]
    top = activations.argsort(descending=True, stable=True)[: min(16, int((activations > 0).sum()))]
    emb = embeddings.rows(top)
    target = (emb / emb.norm(dim=1, keepdim=True)).mean(0)
    for image in images:
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        if edits is None:
            tokens = llava.generate(**inputs, max_new_tokens=2, do_sample=False)
        else:
            with steer(llava, sae, LAYER, edits):
                tokens = llava.generate(**inputs, max_new_tokens=2, do_sample=False)
        answer = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
        cosines.append(float(torch.cosine_similarity(encoder.embed([answer], refuse=False)[0], target, dim=0)))
    return np.mean(cosines)


def asked_images(box, n):
    source = open_images(str(box / "photos"))
    order = np.random.default_rng(0).permutation(N_IMAGES)[:n]
    return [Image.open(box / "photos" / source.image_id(int(i))).convert("RGB") for i in order]


def test_the_command_writes_what_a_plain_loop_gives(box, pieces, tmp_path):
    text = score_command(box, tmp_path / "score.parquet", "--latents", "4:8")
    assert "difference_of_means" in text
    assert "24/24 answers" in text  # three latents that fire, four conditions, two images
    table = pq.read_table(tmp_path / "score.parquet")
    rows = {row["latent"]: row for row in table.to_pylist()}
    assert list(rows) == [4, 5, 6, 7]
    described = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    assert described == described | {
        "alpha": "30",
        "ask": "2",
        "layer": "2",
        "tokens": "all",
        "error": "drop",
        "dtype": "float32",
        "seed": "0",
        "max_new_tokens": "2",
    }
    images = asked_images(box, 2)
    norms = pieces[0].sae.W_dec.detach().norm(dim=1)
    for latent in (4, 6):
        row = rows[latent]
        equal = ALPHA * float(norms[latent] / norms[row["other_latent"]])
        edits = {
            "steered": [clamp(latent, ALPHA)],
            "sae_attached": [],
            "unsteered": None,
            "random_latent": [clamp(row["other_latent"], equal)],
            "sign_flip": [clamp(latent, -ALPHA)],
        }
        for name, edit in edits.items():
            assert row[name] == pytest.approx(plain_score(pieces, latent, edit, images), abs=1e-5), name
    dead = rows[DEAD]
    assert dead["n_top"] == 0
    assert dead["other_latent"] is None
    assert all(np.isnan(dead[name]) for name in CONDITIONS)
    assert not list(tmp_path.glob("*.progress"))


@torch.no_grad()
def test_the_difference_of_means_is_what_its_definition_says(box, pieces, tmp_path):
    """The whole model with hooks of its own: mean residuals by hand, the direction added to the reconstruction."""
    latent, n_reference = 5, 6
    answerer, source, codes, embeddings, encoder = pieces
    config = ScoreConfig((latent,), ALPHA, ask=2, n_reference=n_reference)
    run_ = ScoreRun(tmp_path / "score.json", {})
    table = steering_score(answerer, source, codes, embeddings, encoder, config, run_).table
    llava, processor = load_llava(f"hf:{box / 'llava'}")
    sae, block, caught = answerer.sae, llava.model.vision_tower.encoder.layers[LAYER], []
    text = f"user: <image> {PROMPT} assistant:"

    def mean(rows):
        handle = block.register_forward_hook(lambda m, args, output: caught.append(output[0].mean(0)))
        for row in rows:
            image = Image.open(box / "photos" / source.image_id(int(row))).convert("RGB")
            llava(**processor(text=[text], images=[image], return_tensors="pt"))
        handle.remove()
        means = torch.stack(caught).mean(0)
        caught.clear()
        return means

    activations = dense_codes(codes)[:, latent]
    top = activations.argsort(descending=True, stable=True)[: min(16, int((activations > 0).sum()))]
    direction = mean(top) - mean(np.random.default_rng(0).permutation(N_IMAGES)[:n_reference])
    direction *= ALPHA * sae.W_dec[latent].norm() / direction.norm()
    emb = embeddings.rows(top)
    target = (emb / emb.norm(dim=1, keepdim=True)).mean(0)
    block.register_forward_hook(lambda m, args, output: sae(output) + direction, prepend=True)
    cosines = []
    for image in asked_images(box, 2):
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        tokens = llava.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answer = processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        cosines.append(float(torch.cosine_similarity(encoder.embed([answer], refuse=False)[0], target, dim=0)))
    assert table["difference_of_means"][0].as_py() == pytest.approx(np.mean(cosines), abs=1e-5)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_table(pieces, tmp_path, monkeypatch):
    arguments, config = pieces, ScoreConfig(latents=tuple(range(6)), alpha=ALPHA, ask=1, n_reference=4)
    whole = steering_score(*arguments, config, ScoreRun(tmp_path / "whole.json", {}, latents_per_block=2)).table
    stops = iter([False, True])
    monkeypatch.setattr("saevlm_fast.steering.score._stop_if_asked", lambda stop, run: _raise_if(next(stops)))
    unfinished = ScoreRun(tmp_path / "score.json", {}, latents_per_block=2)
    with pytest.raises(Interrupted):
        steering_score(*arguments, config, unfinished)
    monkeypatch.undo()
    assert len(list(unfinished.progress.glob("block_*.json"))) == 1
    assert not unfinished.output.exists()
    with pytest.raises(ValueError, match=r"^output: an unfinished run is in .*score\.json\.progress; continue it with"):
        steering_score(*arguments, config, unfinished)
    again = ScoreRun(tmp_path / "score.json", {}, resume=True, latents_per_block=2)
    with pytest.raises(ValueError, match=r"^resume: alpha is 31, but the run was started with 30\.0$"):
        steering_score(*arguments, ScoreConfig(tuple(range(6)), 31, ask=1, n_reference=4), again)
    done = []
    (block,) = again.progress.glob("block_*.json")
    whole_block = block.read_bytes()
    block.write_bytes(whole_block.replace(b'"n_top": 1', b'"n_top": 9', 1))
    with pytest.raises(
        ValueError, match=r"^resume: .*block_000000\.json: altered, .*; delete that file and its latents"
    ):
        steering_score(*arguments, config, again)
    block.write_bytes(whole_block)
    resumed = steering_score(*arguments, config, again, lambda *n: done.append(n)).table
    assert resumed.equals(whole)
    assert done[-1] == (16, 16)  # two of three blocks, two latents, four conditions, one image
    written = json.loads((tmp_path / "score.json").read_text())
    assert [row["latent"] for row in written["latents"]] == list(range(6))


def test_a_run_is_resumed_with_the_same_models_and_stores_only(box, pieces, tmp_path):
    """The paths are the same in all cases, what lies there is not."""
    answerer, source, codes, embeddings, encoder = pieces
    config, output = ScoreConfig((5,), ALPHA, ask=1, n_reference=4), tmp_path / "score.json"
    again = ScoreRun(output, {"sae": "sae"}, resume=True)
    asked = SteeredAnswers(answerer.model, answerer.processor, answerer.sae, LAYER, max_new_tokens=2)
    write_unfinished(again, config, asked, codes, embeddings)
    other_sae = deepcopy(answerer.sae)
    with torch.no_grad():
        other_sae.W_dec[0, 0] += 0.5
    other_store = deepcopy(codes)
    other_store.path = tmp_path / "codes"
    shutil.copytree(codes.path, other_store.path)
    edit_record(other_store.path / "index.json")
    half = deepcopy(answerer.model).to(torch.float16)
    cases = {
        r"max_new_tokens is 3, but the run was started with 2": {"max_new_tokens": 3},
        r"dtype is float16, but the run was started with float32": {"model": half},
        r"sae_weights_sha256 is \w{64}, but the run was started with \w{64}": {"sae": other_sae},
        r"codes_sha256 is \w{64}, but the run was started with \w{64}": {"codes": other_store},
    }
    for message, other in cases.items():
        now = {"model": answerer.model, "sae": answerer.sae, "max_new_tokens": 2, "codes": codes} | other
        asked = SteeredAnswers(
            now["model"], answerer.processor, now["sae"], LAYER, max_new_tokens=now["max_new_tokens"]
        )
        with pytest.raises(ValueError, match=f"^resume: {message}$"):
            steering_score(asked, source, now["codes"], embeddings, encoder, config, again)
    asked = SteeredAnswers(answerer.model, answerer.processor, answerer.sae, LAYER, max_new_tokens=2)
    steering_score(asked, source, codes, embeddings, encoder, config, again)
    assert not again.progress.exists()


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_a_finished_table_leaves_nothing_to_do(box, tmp_path, suffix):
    """As a job that is queued again finds it, or one that was killed while it cleared up."""
    output, some = tmp_path / f"score.{suffix}", f"{DEAD - 1}:{DEAD + 1}"
    first = run_json(*score_words(box, output, "--latents", some))
    whole, names = output.read_bytes(), sorted(path.name for path in tmp_path.iterdir())
    progress = tmp_path / f"score.{suffix}.progress"
    progress.mkdir()
    (progress / "block_000000.json").touch()
    (tmp_path / f".writing-01234567-{output.name}").touch()
    text = score_command(box, output, "--latents", some, "--resume")
    assert "nothing left to do" in text
    assert run_json(*score_words(box, output, "--latents", some, "--resume")) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    text = score_command(box, output, "--latents", some, "--resume", "--alpha", 3, code=2)
    assert re.search("resume: alpha is 3.0, but .* was made with .*; --force makes it anew", text)
    assert "already exists; --force replaces it" in score_command(box, output, code=2)
    (tmp_path / f"{output.name}.settings.toml").unlink()
    text = score_command(box, output, "--latents", some, "--resume", code=2)
    assert "already exists without sound settings" in text
    assert output.read_bytes() == whole


def test_a_table_is_read_as_it_was_written(pieces, tmp_path):
    tables = []
    for suffix in ("json", "csv", "parquet"):
        config = ScoreConfig((5, DEAD), ALPHA, ask=1, n_reference=4)
        tables.append(steering_score(*pieces, config, ScoreRun(tmp_path / f"score.{suffix}", {})).table)
        read = read_scores(tmp_path / f"score.{suffix}").table
        assert read.schema == tables[-1].schema
        assert str(read.to_pylist()) == str(tables[-1].to_pylist())  # as text: nan is nan
        (tmp_path / f"score.{suffix}").write_bytes(b"latent\n1\n")
        with pytest.raises(ValueError, match=f"score.{suffix}: not a table of steering scores"):
            read_scores(tmp_path / f"score.{suffix}")


def test_the_random_latent_is_another_one():
    """Of two that fire it can only be the other, whatever the seed."""
    scorer = object.__new__(_Scorer)
    scorer.alive = torch.tensor([3, 8])
    for seed in range(20):
        scorer.config = ScoreConfig((3,), seed=seed)
        assert scorer._random_latent(3) == 8


def test_the_summary_is_of_well_defined_latents():
    columns = {"latent": [0, 1, 2], "n_top": [16, 3, 16]} | {name: [0.5, 9.0, 0.7] for name in MEASURES}
    for mean, std in SteeringScores(pa.table(columns)).summary().values():
        assert mean == pytest.approx(0.6)
        assert std == pytest.approx(0.1, rel=0.5)


def test_one_latent_has_no_spread(capsys):
    columns = {"latent": [0, 1], "n_top": [16, 3]} | {name: [0.5, 9.0] for name in MEASURES}
    scores = SteeringScores(pa.table(columns))
    assert all(mean == 0.5 and math.isnan(std) for mean, std in scores.summary().values())
    _print_scores(scores)
    said = capsys.readouterr().out
    assert "0.5000" in said
    assert "+- 0" not in said
    assert "nan" not in said


def write_unfinished(run, config, answerer, codes, embeddings):
    """A run that was stopped after its only block."""
    run.progress.mkdir()
    settings = steering_score_settings(run, config, answerer, codes, embeddings)
    (run.progress / "settings.json").write_text(json.dumps(settings))
    row = dict.fromkeys(("other_latent", "answer", "answer_share", *MEASURES)) | {"latent": 5, "n_top": 0}
    write_block(run.progress / "block_000000.json", [row])


def test_empty_answers_are_counted(pieces, tmp_path, monkeypatch):
    """A model that falls silent under steering may score well all the same."""
    silent = lambda self, rows, on_rows=None: ["" if row.edits else "red" for row in rows]  # noqa: E731
    monkeypatch.setattr(SteeredAnswers, "answers", silent)
    config = ScoreConfig(tuple(range(DEAD + 1)), ALPHA, ask=2, n_reference=4)
    scores = steering_score(*pieces, config, ScoreRun(tmp_path / "score.json", {}))
    edited = ("steered", "random_latent", "sign_flip")
    assert scores.n_well_defined > 0
    assert scores.empty_answers() == {name: float(name in edited) for name in CONDITIONS}
    dead = scores.table.to_pylist()[DEAD]
    assert np.isnan(dead["steered_empty"])


def _raise_if(stop):
    if stop:
        raise Interrupted
