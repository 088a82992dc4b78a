"""Towers out of files of a whole model, which calls them by many names; and models that are refused by name."""

import json
import re

import pytest
import torch
from many_towers import square
from narrow_towers import randomised
from safetensors.torch import load_file, save_file
from tower_makers import SIZE, SMALL, WIDTH, pictures

from saevlm_fast.scoring.geometry import covered
from saevlm_fast.towers.families import check_called
from saevlm_fast.towers.from_transformers import prefix_in_file
from saevlm_fast.towers.hub import weight_names
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tower import HookPoint

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"), 0)


def blip(t):
    return t.BlipModel(t.BlipConfig(vision_config=SMALL, text_config=TEXT | IDS)), "vision_model"


def git(t):
    return t.GitForCausalLM(t.GitConfig(vision_config=SMALL, **TEXT)), "git.image_encoder"


def vit_without_pooler(t):
    """Beside a text tower that has one."""
    vision = t.ViTModel(t.ViTConfig(**SMALL), add_pooling_layer=False)
    text = t.BertModel(t.BertConfig(**TEXT | {"hidden_size": WIDTH}))
    return t.VisionTextDualEncoderModel(vision_model=vision, text_model=text), "vision_model"


@pytest.mark.parametrize("make", [blip, git, vit_without_pooler])
def test_the_tower_in_a_file_of_the_whole_model(make, tmp_path):
    """Whatever it is called there: its activations are those of the tower inside the model."""
    import transformers as t

    model, inner = make(t)
    randomised(model).save_pretrained(tmp_path)
    square(t).save_pretrained(tmp_path)
    tower = load_tower(f"hf:{tmp_path}")
    with tower.hooked([HookPoint("residual", 1)]) as run:
        inputs = tower.inputs_of(pictures(2))
        (found,) = run(inputs).values()
    pixels = square(t)(pictures(2), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = model.get_submodule(inner)(pixels, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_a_tower_is_called_in_a_file():
    names = ["embeddings.weight", "layers.0.weight", "layers.1.weight"]
    text = [f"model.text.{name}" for name in names[1:]]
    image = [f"model.image.{name}" for name in names]
    assert prefix_in_file(names, names, [*text, *image, "head.weight"], "hf:m") == r"model\.image\."
    assert prefix_in_file(names, names, ["head.weight", "model.text.layers.0.weight"], "hf:m") is None
    assert prefix_in_file([*names, "pooler.weight"], ["pooler.weight"], [*text, "model.text.pooler.weight"], "") is None
    video = [f"model.video.{name}" for name in names]
    with pytest.raises(ValueError, match=r"hf:m: the file holds two towers of this kind, model\.\w+ and model\.\w+"):
        prefix_in_file(names, names, [*image, *video], "hf:m")
    with pytest.raises(ValueError, match=r"twice, as layers.1.weight and model.image.layers.1.weight"):
        prefix_in_file(names, names[:2], image, "hf:m")


def test_weights_of_a_layer_that_the_model_has_not_are_refused(tmp_path):
    """LoRA that is not merged: all weights are there, and yet are not the model's."""
    import transformers as t

    t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL)).save_pretrained(tmp_path)
    square(t).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "q_proj.weight" in name).replace("weight", "lora_A.weight")
    save_file(weights | {name: torch.ones(2, WIDTH)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"q_proj.lora_A.weight of the weights file belongs to a layer that has no such"
    ):
        load_tower(f"hf:{tmp_path}")


class _Called(torch.nn.Module):
    """As far as check_called looks at a model."""

    def __init__(self, family):
        super().__init__()
        self.config = type("Config", (), {"model_type": family})()

    def forward(self, pixel_values, grid_thw, mask=None): ...


def test_towers_that_are_called_otherwise_are_refused_by_name():
    check_called(_Called("new"), ["grid_thw"], "hf:m")
    with pytest.raises(ValueError, match=r"hf:m: _Called is called with grid_thw beside pixels, .* its family, new"):
        check_called(_Called("new"), [], "hf:m")
    with pytest.raises(ValueError, match="hf:m: _Called is a tower of videos, not of images"):
        check_called(_Called("vjepa2"), [], "hf:m")


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_a_tower_that_lies_in_a_file_twice_is_refused(saved, tmp_path, shards):
    """As what was merged by hand: a LLaVA's tower, and the same names beside it. transformers takes either."""
    import shutil

    import transformers as t

    directory = shutil.copytree(saved("llava")[0], tmp_path / "twice")
    model = t.LlavaForConditionalGeneration.from_pretrained(directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(directory, max_shard_size=shards)
    load_tower(f"hf:{directory}")
    names = weight_names(str(directory))
    name = next(name for name in sorted(names) if "vision_tower" in name and name.endswith("fc1.bias"))
    bare = name.partition("vision_tower.")[2]
    file = sorted(directory.glob("*.safetensors"))[-1]
    save_file(load_file(file) | {bare: torch.zeros(32)}, file, metadata={"format": "pt"})
    if (index := directory / "model.safetensors.index.json").exists():
        known = json.loads(index.read_text())
        known["weight_map"][bare] = file.name
        index.write_text(json.dumps(known))
    assert weight_names(str(directory)) == names | {bare}
    said = rf"the file holds 1 weights twice, as {re.escape(bare)} and {re.escape(name)}$"
    with pytest.raises(ValueError, match=said):
        load_tower(f"hf:{directory}")


@pytest.mark.parametrize(
    "name",
    [
        "Florence2VisionConfig",
        "Idefics2VisionConfig",
        "Kimi_K25VisionConfig",
        "PaddleOCRVisionConfig",
        "Phi4MultimodalVisionConfig",
        "VideoLlama3VisionConfig",
    ],
)
def test_families_that_are_known_not_to_be_read_say_why(name, tmp_path):
    import transformers as t

    config = getattr(t, name, None) or pytest.skip(f"transformers {t.__version__} has no {name}")
    config().save_pretrained(tmp_path)
    square(t).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^hf:{tmp_path}: the tower of {name} is not read: it"):
        load_tower(f"hf:{tmp_path}")


def test_a_weight_that_is_missing_is_named_with_what_may_be_it(tmp_path):
    """As of a whole AltCLIP, whose file transformers reads by the names of its text side."""
    import transformers as t

    t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL)).save_pretrained(tmp_path)
    square(t).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("layers.1.", "layer.1."): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing, as (\S+)layers\.1\.(\S+), in whose place the file has \S*layer\.1\.\2$"
    ):
        load_tower(f"hf:{tmp_path}")


def test_a_processor_that_gives_no_pixels_is_refused_by_name(tmp_path):
    import transformers as t

    t.ViTModel(t.ViTConfig(**SMALL)).save_pretrained(tmp_path)
    t.Pix2StructImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives attention_mask, flattened_patches, not pixel_values"):
        load_tower(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"longest_edge": SIZE}, "mask_pad_size": {}, "pad_size": {"height": SIZE, "width": SIZE}},  # SAM
        {"size": {"height": SIZE, "width": SIZE}, "max_patches": 1, "resize_to_max_canvas": False},  # Llama 4
    ],
)
def test_heat_maps_of_towers_that_fill_up_to_the_right_and_below(settings):
    model = {"preprocess": settings}
    assert covered({"model": model}, 640, 480) == (0, 0, 1, pytest.approx(4 / 3))
    assert covered({"model": model}, 480, 640) == (0, 0, pytest.approx(4 / 3), 1)
    assert covered({"model": model | {"square": 64}}, 640, 480) == (0, 0, 1, 1)
