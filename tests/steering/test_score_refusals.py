"""What the steering score refuses, and warns of, in one line."""

import shutil
from copy import deepcopy

import pytest
import torch
from held_locks import held
from small_harvests import dense_codes
from steering_scores import ALPHA, DEAD, S, score_command, steer_command

from saevlm_fast import outputs
from saevlm_fast.config import SAEConfig, ScoreConfig, ScoreRun
from saevlm_fast.data.rows import Activations
from saevlm_fast.provenance import other_text_model, other_tower
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import SteeredAnswers
from saevlm_fast.steering.score import steering_score
from saevlm_fast.towers.load import load_tower


def test_damaged_embeddings_are_found_before_the_first_answer(pieces, tmp_path, monkeypatch):
    answerer, source, codes, embeddings, encoder = pieces
    monkeypatch.setattr(SteeredAnswers, "answers", lambda *_: pytest.fail("asked"))
    x = embeddings.rows(torch.arange(embeddings.n_rows))
    x[int(dense_codes(codes)[:, 5].argmax())] = torch.nan
    score = ScoreConfig((DEAD, 5), ALPHA, ask=1, n_reference=4), ScoreRun(tmp_path / "score.json", {})
    with pytest.raises(ValueError, match=r"tensor \[40, \d+\]: row \d+"):
        steering_score(answerer, source, codes, Activations.from_tensor(x), encoder, *score)
    assert not list(tmp_path.iterdir())


def test_resume_and_force_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"^resume: does not go with force, which starts anew$"):
        ScoreRun(tmp_path / "score.json", {}, resume=True, force=True)


def test_two_processes_do_not_write_one_table(pieces, tmp_path, monkeypatch):
    config, run_ = ScoreConfig((5,), ALPHA, ask=1, n_reference=4), ScoreRun(tmp_path / "score.json", {})
    monkeypatch.setattr(outputs, "LOCK_SECONDS", 0.1)
    refused = pytest.raises(ValueError, match=r"^output: .*score\.json is in use: another process writes to it$")
    with held(tmp_path / ".score.json.lock", "exclusive"), refused:
        steering_score(*pieces, config, run_)
    steering_score(*pieces, config, run_)
    assert [path.name for path in tmp_path.iterdir()] == ["score.json"]


def test_going_on_does_not_replace_settings_of_something_else(box, tmp_path):
    settings = tmp_path / "score.json.settings.toml"
    settings.write_text("mine")
    for more in ((), ("--resume",), ("--resume", "--dry-run")):
        said = score_command(box, tmp_path / "score.json", *more, code=2)
        assert f"output: {settings} already exists; --force replaces it" in said
    assert settings.read_text() == "mine"


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
        (described, None),
        (described | {"weights_sha256": "0"}, f"hf:{box / 'llava'}"),
        (described | {"class": "CLIPVisionModelWithProjection", "weights_sha256": "0"}, None),
        ("clip", None),
    ):
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
