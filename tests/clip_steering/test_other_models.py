"""Both commands on a SigLIP and on a model of open_clip, with random weights; models without a text side."""

import pytest
import torch
from safetensors.torch import save_file

from command import run, run_json
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.towers.load import load_tower

WIDTH = 32


def siglip(folder, monkeypatch):
    import transformers as t

    from saevlm_fast.box_making.architecture import build_tokenizer

    tokenizer = build_tokenizer(ends=True)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **shape,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 9,
        "projection_size": WIDTH,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config={**shape, "image_size": 28, "patch_size": 14}))
    for parameter in model.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    t.SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return f"hf:{folder}"


def open_clip_model(folder, monkeypatch):
    import open_clip

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 14},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", config)
    folder.mkdir()
    save_file(open_clip.create_model("small").state_dict(), folder / "small.safetensors")
    return f"open_clip:small/{folder / 'small.safetensors'}"


@pytest.mark.parametrize("make", [siglip, open_clip_model])
def test_both_commands(make, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = make(tmp_path / "model", monkeypatch)
    SparseAutoencoder(SAEConfig(WIDTH, 24, 4, "topk")).save_pretrained(tmp_path / "sae")
    (tmp_path / "words.txt").write_text("red\nblue\nstar\n")
    common = ("--model", model, "--sae", tmp_path / "sae", "--layer", 0, "--device", "cpu")
    words = ("--images", "scenes:test:4", "--words", tmp_path / "words.txt", "--template", "a {} thing", "--ask", 2)
    tokens = ("--tokens", "all" if make is siglip else "cls")
    found = run_json("steerability", *common, *words, *tokens, "--output", tmp_path / "s.csv", "--controls", 5)
    assert found["of_latents"]["asked"] + found["of_latents"]["dead"] == 24
    assert 0 < found["of_latents"]["s"] < 2
    assert 0 < found["of_neurons"]["s"] < 2
    scenes = ("--images", "scenes:test:60", "--labels", "scene:backdrop", "--k", 1, "--limit", 10)
    [layer] = run_json("erase", *common, *scenes, "--output", tmp_path / "e.json")["layers"]
    assert [row["removal"] for row in layer["table"]][:2] == ["nothing", "latents"]
    assert layer["table"][0]["clean"]["n"] == 10
    if make is siglip:
        text = run("steerability", *common, *words, "--tokens", "cls", "--output", tmp_path / "t.csv", code=2)
        assert f"error: tokens: 'cls' is not one of all of {model}" in text
        other = ("--text-model", "hf:tiny-clip", "--output", tmp_path / "t.csv", "--tokens", "all")
        text = run("steerability", *common, *words, *other, code=2)
        d = load_tower(model, "cpu").anatomy.width
        assert f"the images of the model {d}: no shared space" in text


@pytest.mark.parametrize("command", ["steerability", "erase"])
@pytest.mark.parametrize("model", ["timm:vit_tiny_patch16_224", "hf:tiny-llava"])
def test_models_without_texts_are_named(command, model, tmp_path):
    SparseAutoencoder(SAEConfig(WIDTH, 24, 4, "topk")).save_pretrained(tmp_path / "sae")
    output = tmp_path / ("out.csv" if command == "steerability" else "out.json")
    common = ("--model", model, "--sae", tmp_path / "sae", "--layer", 0, "--images", "scenes:test:60")
    more = ("--labels", "scene:backdrop", "--k", 1) if command == "erase" else ()
    text = run(command, *common, *more, "--output", output, "--device", "cpu", code=2)
    assert text.count("\n") == 1  # before anything is downloaded
    assert "is not hf:NAME_OR_DIR or open_clip" in text if model.startswith("timm") else "has no text side" in text
