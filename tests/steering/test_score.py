"""The commands steer and steering-score on a small random LLaVA: against a plain re-implementation, and resumed."""

import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from command import ROOT, files_below, run, run_json
from damage import edit_record
from saevlm_fast import outputs
from saevlm_fast.box_making.architecture import build_clip, build_llava, clip_processor, llava_processor
from saevlm_fast.config import PROMPT, SAEConfig, ScoreConfig, ScoreRun
from saevlm_fast.data.codes import open_codes
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.errors import Interrupted
from saevlm_fast.images.open import open_images
from saevlm_fast.provenance import other_text_model, other_tower
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import SteeredAnswers
from saevlm_fast.steering.edits import clamp, steer
from saevlm_fast.steering.score import _Scorer, firing_latents, steering_score
from saevlm_fast.steering.score import _settings as steering_score_settings
from saevlm_fast.steering.table import CONDITIONS, MEASURES, SteeringScores, read_scores, write_block
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.text import load_llava, load_text_encoder
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
    """(answerer, images, codes, embeddings, text encoder), as steering_score takes them."""
    model, processor = load_llava(f"hf:{box / 'llava'}")
    sae = SparseAutoencoder.from_pretrained(box / "sae")
    answerer = SteeredAnswers(model, processor, sae, LAYER, max_new_tokens=2)
    sides = open_images(str(box / "photos")), open_codes(box / "codes"), open_activations(box / "embeddings")
    return answerer, *sides, load_text_encoder(f"hf:{box / 'clip'}")


def score_words(box, output, *more):
    places = {"model": f"hf:{box / 'llava'}", "sae": box / "sae", "images": box / "photos", "codes": box / "codes"}
    places |= {"embeddings": box / "embeddings", "text-model": f"hf:{box / 'clip'}", "output": output}
    chosen = {"layer": LAYER, "alpha": ALPHA, "ask": 2, "max-new-tokens": 2, "device": "cpu"}
    given = [word for name, value in (places | chosen).items() for word in (f"--{name}", value)]
    return "steering-score", *given, *more


def score_command(box, output, *more, code=0):
    return run(*score_words(box, output, *more), code=code)


def dense_codes(codes):
    return torch.cat([chunk.dense() for _, chunk in codes.chunks(7)])


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
        "alpha": "30", "ask": "2", "layer": "2", "tokens": "all", "error": "drop", "dtype": "float32", "seed": "0",
        "max_new_tokens": "2",
    }  # fmt: skip
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


def test_damaged_embeddings_are_found_before_the_first_answer(pieces, tmp_path, monkeypatch):
    answerer, source, codes, embeddings, encoder = pieces
    monkeypatch.setattr(SteeredAnswers, "answers", lambda *_: pytest.fail("asked"))
    x = embeddings.rows(torch.arange(embeddings.n_rows))
    x[int(dense_codes(codes)[:, 5].argmax())] = torch.nan
    score = ScoreConfig((DEAD, 5), ALPHA, ask=1, n_reference=4), ScoreRun(tmp_path / "score.json", {})
    with pytest.raises(ValueError, match=r"tensor \[40, \d+\]: row \d+"):
        steering_score(answerer, source, codes, Activations.from_tensor(x), encoder, *score)
    assert not list(tmp_path.iterdir())


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


def test_resume_and_force_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"^resume: does not go with force, which starts anew$"):
        ScoreRun(tmp_path / "score.json", {}, resume=True, force=True)


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


def test_two_processes_do_not_write_one_table(pieces, tmp_path, monkeypatch):
    config, run_ = ScoreConfig((5,), ALPHA, ask=1, n_reference=4), ScoreRun(tmp_path / "score.json", {})
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); "
         "print('held', flush=True); time.sleep(60)", str(tmp_path / ".score.json.lock")], stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    monkeypatch.setattr(outputs, "LOCK_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"^output: .*score\.json is in use: another process writes to it$"):
        steering_score(*pieces, config, run_)
    holder.kill()
    holder.wait()
    steering_score(*pieces, config, run_)
    assert [path.name for path in tmp_path.iterdir()] == ["score.json"]


def _raise_if(stop):
    if stop:
        raise Interrupted


def test_the_score_refuses_in_one_line(box, tmp_path):
    output = tmp_path / "score.json"
    assert "latents: 48 to 48 are asked for; there are 0 to 47" in score_command(box, output, "--latents", "48", code=2)
    assert "latents: '9:9' chooses none of 48" in score_command(box, output, "--latents", "9:9", code=2)
    assert "alpha: nan is not finite" in score_command(box, output, "--alpha", "nan", code=2)
    text = score_command(box, output, "--latents", "40:49", code=2)
    assert "latents: '40:49' goes beyond the last of 48" in text
    assert "alpha: 1e+39 is not finite in float32" in score_command(box, output, "--alpha", "1e39", code=2)
    assert "seed: -1 must not be negative" in score_command(box, output, "--seed", -1, code=2)
    assert "prompt: is empty" in score_command(box, output, "--prompt", " ", code=2)
    photo = next((box / "photos").rglob("*.png"))
    few = tmp_path / "few" / photo.relative_to(box / "photos")
    few.parent.mkdir(parents=True)
    shutil.copy(photo, few)
    text = score_command(box, output, "--images", tmp_path / "few", code=2)
    assert "images: 39 of the codes' 40 are not there, as '" in text
    assert not list(tmp_path.glob("*.progress"))
    text = score_command(box, output, "--embeddings", box / "codes", code=2)
    assert "a store of codes; needed is one of activations" in text
    text = score_command(box, output, "--text-model", "timm:vit", code=2)
    assert "text_model: 'timm:vit' is not hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED" in text


def test_what_does_not_belong_together_is_refused(box, tmp_path):
    output = tmp_path / "score.json"
    other = SparseAutoencoder(SAEConfig(128, S, 8, "topk"))
    other.save_pretrained(tmp_path / "other")
    text = score_command(box, output, "--sae", tmp_path / "other", code=2)
    assert f"codes: {box / 'codes'} are of another SAE ({box / 'sae'}) than {tmp_path / 'other'}" in text
    text = score_command(box, output, "--layer", 1, code=2)
    assert f"codes: {box / 'codes'} are of residual of layer 2, not of layer 1" in text
    for source, what in (({"point": "residual", "layer": 2}, "residual of layer 2"), ({"point": "pooled"}, "pooled")):
        config = SAEConfig(128, S, 8, "topk", metadata={"source": source | {"tokens": "cls"}})
        SparseAutoencoder(config).save_pretrained(tmp_path / what)
        text = steer_command(box, "--latent", 1, "--alpha", 1, "--sae", tmp_path / what, "--layer", 1, code=2)
        assert f"layer: 1, but the SAE was trained on {what}" in text
    steer_command(box, "--latent", 1, "--alpha", 1, "--sae", tmp_path / "residual of layer 2")


def test_embeddings_of_another_model(box, pieces):
    _, _, _, embeddings, encoder = pieces
    assert other_text_model(embeddings, encoder.spec) is None
    assert other_text_model(embeddings, f"hf:{box}/../{box.name}/clip") is None  # the same by another name
    assert f"are of {encoder.spec}, and the texts' are of hf:openai/clip" in other_text_model(
        embeddings, "hf:openai/clip"
    )
    unknown = deepcopy(embeddings)
    unknown.source = None
    assert other_text_model(unknown, "hf:openai/clip") is None
    unknown.source = {"point": "residual", "layer": 3}
    with pytest.raises(ValueError, match=r"^embeddings: .* are residual of layer 3; harvest --point projection$"):
        other_text_model(unknown, "hf:openai/clip")


def test_an_sae_of_another_tower_is_warned_of(box, pieces):
    llava = pieces[0].model
    described = load_tower(f"hf:{box / 'llava'}").description()
    for model, expected in (
        (described, None), (described | {"weights_sha256": "0"}, f"hf:{box / 'llava'}"),
        (described | {"class": "CLIPVisionModelWithProjection", "weights_sha256": "0"}, None), ("clip", None),
    ):  # fmt: skip
        sae = SparseAutoencoder(SAEConfig(128, S, 8, "topk", metadata={"source": {"model": model}}))
        assert other_tower(sae, llava) == expected
    half = SparseAutoencoder(SAEConfig(128, S, 8, "topk", metadata={"source": {"model": described}}))
    rounded = deepcopy(llava).to(torch.float16)
    assert other_tower(half, rounded) is not None
    sae.config.metadata["source"]["model"] = described | {"weights_sha256": "0"}
    sae.save_pretrained(box / "elsewhere")
    text = steer_command(box, "--latent", 1, "--alpha", 1, "--sae", box / "elsewhere")
    assert f"elsewhere was trained on the vision tower of hf:{box / 'llava'}, whose weights are not those of" in text


def test_no_well_defined_latent_is_one_sentence(box, tmp_path):
    text = score_command(box, tmp_path / "score.json", "--latents", DEAD)
    assert "none of the 1 latents fires on 16 images or more, so there is no mean" in text
    assert "nan" not in text


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
    assert parsed == parsed | {"layer": LAYER, "tokens": "all", "only": False, "error": "drop", "dtype": "float32",
                               "max_new_tokens": 3}  # fmt: skip
    assert list(parsed["controls"]) == ["unsteered", "sae_attached"]
    assert [(row["latent"], row["alpha"]) for row in parsed["steered"]] == [(3, 10), (3, 50), (4, 10), (4, 50)]


def test_steer_dry_run(box):
    before = files_below(box)
    text = steer_command(box, "--latent", "3,4", "--alpha", 10, "--dry-run")
    for part in ("dry run: 4 answers of hf:", "memory", " s "):
        assert part in text
    assert "latent: 99 of an SAE whose latents are 0 to 47" in steer_command(
        box, "--latent", 99, "--alpha", 1, "--dry-run", code=2
    )
    assert files_below(box) == before


def test_steering_score_dry_run_json_and_settings(box, tmp_path):
    output = tmp_path / "score.json"
    before = files_below(box)
    text = score_command(box, output, "--latents", f"3,{DEAD}", "--dry-run")
    for part in ("dry run: steering score of 2 latents", "latents that fire", "all answers"):
        assert part in text
    figures = json.loads(score_command(box, output, "--latents", f"3,{DEAD}", "--dry-run", "--json"))
    assert (figures["latents"], figures["latents_that_fire"], figures["answers"]) == (2, 1, 12)
    assert (files_below(box), files_below(tmp_path)) == (before, {})
    found = json.loads(score_command(box, output, "--latents", f"3,{DEAD}", "--json"))
    assert found["output"] == str(output)
    assert set(found["conditions"]["steered"]) == {"mean", "std", "empty_answers"}
    again = tmp_path / "again.json"
    run("steering-score", "--config", tmp_path / "score.json.settings.toml", "--output", again)
    assert json.loads(again.read_text())["latents"] == json.loads(output.read_text())["latents"]
    assert "already exists; --force replaces it" in score_command(box, output, "--dry-run", code=2)


def test_steer_refuses_in_one_line(box):
    assert "layer: 4 changes nothing" in steer_command(box, "--latent", 3, "--alpha", 1, "--layer", 4, code=2)
    assert "latent: 99 of an SAE whose latents are 0 to 47" in steer_command(box, "--latent", 99, "--alpha", 1, code=2)
    assert "alpha: inf of latent 3 is not finite" in steer_command(box, "--latent", 3, "--alpha", "inf", code=2)
    assert "alpha: 'much' is not a number" in steer_command(box, "--latent", 3, "--alpha", "much", code=2)
    assert "alpha: 1e+39 of latent 3 is not finite in float32" in steer_command(
        box, "--latent", 3, "--alpha", "1e39", code=2
    )
    assert "prompt: is empty" in steer_command(box, "--latent", 3, "--alpha", 1, "--prompt", "", code=2)
    (box / "damaged.png").write_bytes(b"no image")
    text = steer_command(box, "--latent", 3, "--alpha", 1, "--image", box / "damaged.png", code=2)
    assert f"image: {box / 'damaged.png'}: not an image" in text
    text = run("steer", "--model", "timm:x", "--sae", box / "sae", "--layer", 1, "--image", box / "none.png",
               "--prompt", "?", "--latent", 1, "--alpha", 1, code=2)  # fmt: skip
    assert "no such file" in text


def test_the_example_of_the_documentation_runs_as_it_stands(tmp_path, monkeypatch):
    page = (Path(ROOT) / "docs" / "how-to" / "steer.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "SteeredAnswers" in block)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 50), "red").save("photo.png")
    SparseAutoencoder(SAEConfig(128, 32, 4, "topk")).save_pretrained("sae")
    names: dict = {}
    exec(example, names)
    assert len(names["answers"]) == 17
    new = names["tokens"][:, names["inputs"]["input_ids"].shape[1] :]
    first_word = names["processor"].batch_decode(new, skip_special_tokens=True)[0].split()[0]
    assert names["answers"][13].startswith(first_word)  # latent 12
