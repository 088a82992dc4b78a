"""What the records of released weights say of how they run: every entry of open_clip's and timm's tables, no weights."""

import json

import pytest
import torch

from saevlm_fast.towers import from_open_clip, from_timm
from saevlm_fast.towers.load import load_tower

QUICK = {"act_layer": "quick_gelu"}


@pytest.fixture
def made(monkeypatch):
    """The options that open_clip.create_model is called with, as if every file were in the cache."""
    import open_clip

    calls = []
    monkeypatch.setattr(from_open_clip, "cached_file", lambda repo, names: f"/{repo}/{names[0]}")
    monkeypatch.setattr(open_clip, "create_model", lambda arch, file, **options: calls.append((arch, file, options)))
    return calls


def test_every_record_of_open_clip_is_applied(made):
    import open_clip

    told, applied = [], 0
    for arch, tag in open_clip.list_pretrained():
        from_open_clip.open_clip_model(f"{arch}/{tag}", f"open_clip:{arch}/{tag}", told.append)
        record, own = open_clip.get_pretrained_cfg(arch, tag), open_clip.get_model_config(arch)
        options = made[-1][2]
        assert options["force_quick_gelu"] == record.get("quick_gelu", own.get("quick_gelu", False)), (arch, tag)
        applied += options["force_quick_gelu"] and not own.get("quick_gelu", False)
        expected = {name: record[name] for name in ("mean", "std", "interpolation", "resize_mode")}
        assert options["force_preprocess_cfg"] == expected, (arch, tag)
    assert len(made) == len(open_clip.list_pretrained())
    assert applied >= 27  # run with GELU if the architecture alone is asked
    assert len(told) == 1
    assert told[0].startswith(
        "open_clip:roberta-ViT-B-32/laion2b_s12b_b32k: the record of laion2b_s12b_b32k says nothing"
    )


def test_a_record_that_open_clip_cannot_follow_is_refused(made, monkeypatch):
    import open_clip

    record = dict(open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli"))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda arch, tag: record)
    for said, message in (
        (
            {"quick_gelu": True},
            r"record of webli says QuickGELU, and open_clip runs towers of timm \(vit_base.*\) with",
        ),
        ({"size": 384}, "record of webli says images of 384, and ViT-B-16-SigLIP takes 224"),
    ):
        record.update(said)
        with pytest.raises(ValueError, match=message):
            from_open_clip.open_clip_model("ViT-B-16-SigLIP/webli", "open_clip:x", print)
        record.pop(next(iter(said)))
    record["quick_gelu"] = False
    with pytest.raises(ValueError, match="record of openai says GELU, and ViT-B-32-quickgelu is made with QuickGELU"):
        from_open_clip.open_clip_model("ViT-B-32-quickgelu/openai", "open_clip:x", print)


def test_a_file_of_unknown_activation_is_told(made, tmp_path):
    file, told = tmp_path / "w.safetensors", []
    file.touch()
    load = lambda arch: from_open_clip.open_clip_model(f"{arch}/{file}", "open_clip:x", told.append)  # noqa: E731
    load("ViT-B-32-quickgelu")
    assert made[-1][2]["force_quick_gelu"]
    assert told == []
    load("ViT-B-32-256")
    assert told == []
    load("ViT-H-14-378")
    assert not made[-1][2]["force_quick_gelu"]
    assert "w.safetensors does not say its activation; GELU, as ViT-H-14-378 has it" in told[0]
    assert "need open_clip:ViT-H-14-378-quickgelu/FILE" in told[0]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    load("ViT-H-14-378")
    assert made[-1][2]["force_quick_gelu"]
    assert len(told) == 1


def test_open_clip_runs_quick_gelu_where_it_is_forced():
    """That the option does what it says, in image and text side."""
    import open_clip
    from open_clip.model import QuickGELU

    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"] |= {"layers": 1, "width": 64}
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1, "vocab_size": 50}
    with torch.device("meta"):
        model = open_clip.CLIP(**config, quick_gelu=True)
    kinds = [type(side.resblocks[0].mlp.gelu) for side in (model.visual.transformer, model.transformer)]
    assert kinds == [QuickGELU, QuickGELU]


def test_every_record_of_timm_agrees_with_open_clips_of_the_same_file(monkeypatch):
    """A note in timm, a field in open_clip; convolutional ones, which are refused, have no note."""
    import open_clip
    import timm

    records = {}
    for arch, tag in open_clip.list_pretrained():
        record = open_clip.get_pretrained_cfg(arch, tag)
        records[record.get("hf_hub", "").rstrip("/")] = bool(record.get("quick_gelu"))
    seen, made = [], []
    monkeypatch.setattr(from_timm, "cached_file", lambda repo, names: f"/{repo}")
    monkeypatch.setattr(timm, "create_model", lambda name, **options: made.append(options))
    for name in timm.list_pretrained():
        repo = timm.get_pretrained_cfg(name).hf_hub_id
        if repo in records and not name.startswith("resnet"):
            from_timm._released(name, f"timm:{name}", print)
            assert (made[-1].get("act_layer") == "quick_gelu") == records[repo], name
            assert made[-1]["pretrained_cfg_overlay"] == {"file": f"/{repo}"}
            assert from_timm.released_options(f"hf-hub:timm/{name}", {}) == (QUICK if records[repo] else {})
            seen.append(records[repo])
    assert sum(seen) >= 25
    assert False in seen


def test_a_timm_directory_with_the_note_runs_quick_gelu(tmp_path):
    import timm
    from safetensors.torch import save_file

    record = {
        "tag": "x",
        "notes": ["natively QuickGELU, use quickgelu model variant for original results"],
        "input_size": [3, 160, 160],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    config = {"architecture": "test_vit", "num_classes": 0, "num_features": 64, "pretrained_cfg": record}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "model.safetensors")
    tower = load_tower(f"timm:local-dir:{tmp_path}")
    assert type(tower.model.blocks[0].mlp.act).__name__ == "QuickGELU"
    applied = tower.anatomy.description["preprocess"]
    assert (applied["mean"], applied["interpolation"]) == ([0.1, 0.2, 0.3], "bilinear")
    with pytest.raises(ValueError, match=f"a checkpoint of timm; give timm:local-dir:{tmp_path}"):
        load_tower(f"hf:{tmp_path}")


def test_a_timm_file_of_unknown_origin_is_told():
    assert from_timm._doubt_of_file("test_vit") is None
    assert from_timm._doubt_of_file("vit_base_patch32_clip_224").startswith("its activation (GELU)")
    assert "mean ((0.5, 0.5, 0.5))" in from_timm._doubt_of_file("vit_base_patch16_224")
    assert from_timm._doubt_of_file("vit_large_patch14_clip_quickgelu_336") is None
    noted = "vit_base_patch32_clip_224.openai"
    assert from_timm.released_options(noted, {}) == QUICK
    assert from_timm.released_options("vit_base_patch32_clip_224.laion2b", {}) == {}
