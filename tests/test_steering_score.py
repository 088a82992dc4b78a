"""The commands steer and steering-score on a small random LLaVA: against a plain re-implementation, and resumed."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from saevlm_fast.activations import open_activations
from saevlm_fast.box_models import build_clip, build_llava, clip_processor, llava_processor
from saevlm_fast.codes import open_codes
from saevlm_fast.config import Interrupted, SAEConfig
from saevlm_fast.images import open_images
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steered_answers import SteeredAnswers
from saevlm_fast.steering import clamp, steer
from saevlm_fast.steering_score import (
    CONDITIONS,
    PROMPT,
    ScoreConfig,
    ScoreRun,
    firing_latents,
    steering_score,
)
from saevlm_fast.text_models import load_llava, load_text_encoder
from test_cli import ROOT, run
from tiny_tower import save_photos

LAYER, N_IMAGES, S, DEAD, ALPHA = 2, 40, 48, 7, 30.0


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A directory with llava, clip, photos, sae (latent DEAD never fires), codes and embeddings."""
    root = tmp_path_factory.mktemp("box")
    torch.manual_seed(0)
    clip = build_clip()
    for module in clip.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
    llava = build_llava(clip)
    for module in llava.model.multi_modal_projector.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
    for model, processor, name in ((llava, llava_processor(), "llava"), (clip, clip_processor(), "clip")):
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    save_photos(root / "photos", N_IMAGES)
    sae = SparseAutoencoder(SAEConfig(128, S, 8, "batch_topk"))
    with torch.no_grad():
        sae.threshold.fill_(3.0)
        sae.W_enc[:, DEAD] = 0
        sae.W_dec *= torch.linspace(0.5, 2, S)[:, None]  # so that equal norms need different alphas
    sae.save_pretrained(root / "sae")
    harvest = ("harvest", "--images", root / "photos", "--workers", 0, "--device", "cpu")
    run(*harvest, "--model", f"hf:{root / 'llava'}", "--layer", LAYER, "--tokens", "all", "--sae", root / "sae",
        "--pool", "mean", "--output", root / "codes")  # fmt: skip
    run(*harvest, "--model", f"hf:{root / 'clip'}", "--point", "projection", "--output", root / "embeddings")
    return root


@pytest.fixture(scope="module")
def pieces(box):
    """(asking, images, codes, embeddings, text encoder), as steering_score takes them."""
    model, processor = load_llava(f"hf:{box / 'llava'}")
    sae = SparseAutoencoder.from_pretrained(box / "sae")
    asking = SteeredAnswers(model, processor, sae, LAYER, max_new_tokens=2)
    sides = open_images(str(box / "photos")), open_codes(box / "codes"), open_activations(box / "embeddings")
    return asking, *sides, load_text_encoder(f"hf:{box / 'clip'}")


def score_command(box, output, *more, code=0):
    return run(
        "steering-score", "--model", f"hf:{box / 'llava'}", "--sae", box / "sae", "--layer", LAYER,
        "--images", box / "photos", "--codes", box / "codes", "--embeddings", box / "embeddings",
        "--text-model", f"hf:{box / 'clip'}", "--alpha", ALPHA, "--ask", 2, "--max-new-tokens", 2, "--device", "cpu",
        "--output", output, *more, code=code,
    )  # fmt: skip


def dense_codes(codes):
    dense = torch.zeros(codes.n_rows, codes.d_sae)
    for start, acts, latents, offsets in codes.chunks(7):
        for row in range(len(offsets) - 1):
            entries = slice(int(offsets[row]), int(offsets[row + 1]))
            dense[start + row, latents[entries]] = acts[entries]
    return dense


def test_latents_that_fire_anywhere(box):
    codes = open_codes(box / "codes")
    firing = firing_latents(codes, batch_rows=9).tolist()
    assert firing == dense_codes(codes).any(0).nonzero().flatten().tolist()
    assert DEAD not in firing


@torch.no_grad()
def plain_score(pieces, latent, edits, images):
    """One answer at a time, through the hooks, embedded and compared by hand; edits None: no SAE."""
    asking, _, codes, embeddings, encoder = pieces
    llava, processor, sae = asking.model, asking.processor, asking.sae
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
    assert table.schema.metadata[b"alpha"] == b"30"
    images = asked_images(box, 2)
    norms = pieces[0].sae.W_dec.detach().norm(dim=1)
    for latent in (4, 6):
        row = rows[latent]
        equal = ALPHA * float(norms[latent] / norms[row["other_latent"]])
        edits = {
            "steered": [clamp(latent, ALPHA)], "sae_attached": [], "unsteered": None,
            "random_latent": [clamp(row["other_latent"], equal)], "sign_flip": [clamp(latent, -ALPHA)],
        }  # fmt: skip
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
    asking, source, codes, embeddings, encoder = pieces
    config = ScoreConfig((latent,), ALPHA, ask=2, n_reference=n_reference)
    run_ = ScoreRun(tmp_path / "score.json", {})
    table = steering_score(asking, source, codes, embeddings, encoder, config, run_).table
    llava, processor = load_llava(f"hf:{box / 'llava'}")
    sae, block, caught = asking.sae, llava.model.vision_tower.encoder.layers[LAYER], []
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
    monkeypatch.setattr("saevlm_fast.steering_score._stop_if_asked", lambda stop, run: _raise_if(next(stops)))
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
    resumed = steering_score(*arguments, config, again, lambda *n: done.append(n)).table
    assert resumed.equals(whole)
    assert done[-1] == (16, 16)  # two of three blocks, two latents, four conditions, one image
    written = json.loads((tmp_path / "score.json").read_text())
    assert [row["latent"] for row in written["latents"]] == list(range(6))


def _raise_if(stop):
    if stop:
        raise Interrupted


def test_the_score_refuses_in_one_line(box, tmp_path):
    output = tmp_path / "score.json"
    assert "layer: 4 changes nothing" in score_command(box, output, "--layer", 4, code=2)
    assert "latents: 48 to 48 are asked for; there are 0 to 47" in score_command(box, output, "--latents", "48", code=2)
    assert "latents: '9:9' chooses none of 48" in score_command(box, output, "--latents", "9:9", code=2)
    assert "alpha: nan is not finite" in score_command(box, output, "--alpha", "nan", code=2)
    text = score_command(box, output, "--embeddings", box / "codes", code=2)
    assert "a store of codes; needed is one of activations" in text
    text = score_command(box, output, "--text-model", "timm:vit", code=2)
    assert "text_model: 'timm:vit' is not hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED" in text


def steer_command(box, *more, code=0):
    photo = next((box / "photos").rglob("*.png"))
    return run("steer", "--model", f"hf:{box / 'llava'}", "--sae", box / "sae", "--layer", LAYER, "--image", photo,
               "--prompt", "What colour is the object?", "--device", "cpu", "--max-new-tokens", 3, *more,
               code=code)  # fmt: skip


def test_steer_prints_controls_first(box):
    text = steer_command(box, "--latent", "3,4", "--alpha", 10, "--alpha", 50)
    places = [text.index(label) for label in ("no SAE", "SAE, no edit", " 3 ", " 4 ")]
    assert places == sorted(places)
    parsed = json.loads(steer_command(box, "--latent", "3,4", "--alpha", "10,50", "--json"))
    assert list(parsed["controls"]) == ["unsteered", "sae_attached"]
    assert [(row["latent"], row["alpha"]) for row in parsed["steered"]] == [(3, 10), (3, 50), (4, 10), (4, 50)]


def test_steer_refuses_in_one_line(box):
    assert "latent: 99 of an SAE whose latents are 0 to 47" in steer_command(box, "--latent", 99, "--alpha", 1, code=2)
    assert "alpha: inf of latent 3 is not finite" in steer_command(box, "--latent", 3, "--alpha", "inf", code=2)
    assert "alpha: 'much' is not a number" in steer_command(box, "--latent", 3, "--alpha", "much", code=2)
    text = run("steer", "--model", "timm:x", "--sae", box / "sae", "--layer", 1, "--image", box / "none.png",
               "--prompt", "?", "--latent", 1, "--alpha", 1, code=2)  # fmt: skip
    assert "is not a file" in text


def test_the_example_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    readme = (Path(ROOT) / "README.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "SteeredAnswers" in block)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 50), "red").save("photo.png")
    SparseAutoencoder(SAEConfig(128, 32, 4, "topk")).save_pretrained("sae")
    names: dict = {}
    exec(example, names)
    assert len(names["answers"]) == 17
    new = names["tokens"][:, names["inputs"]["input_ids"].shape[1] :]
    first_word = names["processor"].batch_decode(new, skip_special_tokens=True)[0].split()[0]
    assert names["answers"][13].startswith(first_word)  # latent 12
