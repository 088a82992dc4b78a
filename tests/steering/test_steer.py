"""The command steer, dry runs, and the example of the documentation."""

import json
import re
from pathlib import Path

from PIL import Image
from steering_scores import DEAD, LAYER, score_command, steer_command

from command import ROOT, files_below, run
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder


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
    for part in ("dry run: 4 answers of hf:", "memory", "memory leaves out", " s "):
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
