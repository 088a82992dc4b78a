"""Set-up: towers whose rows would be lost, mixed or misnamed are refused by name, or right."""

import json
import sys

import numpy as np
import pytest
import torch
from narrow_towers import randomised
from PIL import Image

from saevlm_fast.towers.forms import Form
from saevlm_fast.towers.from_timm import wrap_timm
from saevlm_fast.towers.from_transformers import transformers_anatomy, wrap_transformers
from saevlm_fast.towers.load import find_anatomy, load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL = SIZES | {"image_size": 32, "patch_size": 8}
RESIDUAL, POOLED = HookPoint("residual", 1), HookPoint("pooled")


def wrapped(model, processor=None):
    import transformers as t

    processor = processor or t.ViTImageProcessor(size={"height": 32, "width": 32})
    return wrap_transformers(randomised(model), processor, "hf:x")


def refusal(tower, point=RESIDUAL):
    with pytest.raises(ValueError, match=r"^(hf|timm|point)\b.*") as error, tower.hooked([point]):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def pictures(n=3):
    generator = np.random.default_rng(2)
    return [Image.fromarray(generator.integers(0, 256, (40 + 8 * i, 48, 3), dtype=np.uint8)) for i in range(n)]


# --- rows lost or mixed -----------------------------------------------------------------------------------------------


def test_a_packing_tower_whose_images_cannot_be_told_apart():
    """One block that loses a patch, and one that hands all of them on in another order for the second image."""
    import transformers as t

    config = t.PixtralVisionConfig(**SIZES, image_size=64, patch_size=16)
    processor = t.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16})
    changes = {
        r"a block gives \[1, 23, 32\] for 24 patches of 2 images": lambda x: x[:, 1:],
        "residual-1 of an image is another one in a batch": lambda x: x.flip(1),
    }
    for message, change in changes.items():
        tower = wrapped(t.PixtralVisionModel(config), processor)
        with tower.hooked([RESIDUAL]) as run:
            assert run.layout.grid is None
        tower.model.transformer.layers[0].register_forward_hook(lambda module, args, output, f=change: f(output))
        with pytest.raises(ValueError, match=message), tower.hooked([RESIDUAL]):
            pass


def test_a_tower_that_packs_and_is_not_known_is_refused():
    import transformers as t

    tower = wrapped(t.PixtralVisionModel(t.PixtralVisionConfig(**SIZES, image_size=64, patch_size=16)))
    tower.anatomy.form = Form()
    message = r"hf:x: not a plain vision transformer: its blocks give \[1, \d+, 32\] for 2 images, not \[2, T, D\]"
    with pytest.raises(ValueError, match=message), tower.hooked([RESIDUAL]):
        pass


def test_processors_that_take_a_list_for_one_sample(monkeypatch):
    import transformers as t

    from saevlm_fast.towers import preprocess

    monkeypatch.setattr(preprocess, "_SAMPLES", ())
    edge = {"longest_edge": 32}
    processor = t.SmolVLMImageProcessor(size=edge, max_image_size=edge)
    with pytest.raises(ValueError, match=r"SmolVLMImageProcessor gives \[1, .*\] for 2 images, not each its"):
        wrapped(t.ViTModel(t.ViTConfig(**SMALL)), processor)


def test_a_random_order_of_patches():
    import transformers as t

    tower = wrapped(t.ViTMAEModel(t.ViTMAEConfig(**SMALL)))
    with tower.hooked([RESIDUAL]) as run:
        assert run.layout.grid == (4, 4)
    tower.anatomy.call = lambda model, inputs: model(**inputs)
    assert "residual-1 of an image is another one each time (a random choice in the model)" in refusal(tower)
    tower.model.config.mask_ratio = 0.75
    assert "5 tokens of an image of 32 x 32, not 1 before the patches and 16 patches" in refusal(tower)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x[:1].expand_as(x),
        lambda x: x.flip(0),
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: torch.cat([x[-1:], x[1:]]),
        lambda x: x[x.flatten(1).sum(1).argsort()],
        lambda x: x[x.flatten(1).sum(1).argsort(descending=True)],
        lambda x: x - 0.1 * x.mean(0, keepdim=True),
    ],
    ids=["first", "reversed", "mean", "last", "sorted", "sorted down", "a tenth"],
)
def test_images_of_a_batch_that_are_mixed(mix):
    import transformers as t

    tower = wrapped(t.ViTModel(t.ViTConfig(**SMALL)))
    tower.model.layers[0].register_forward_hook(lambda module, args, output: mix(output))
    assert "residual-1 of an image is another one in a batch" in refusal(tower)


def test_every_batch_has_the_shapes_of_set_up():
    import transformers as t

    tower = wrapped(t.ViTModel(t.ViTConfig(**SMALL)))
    with tower.hooked([RESIDUAL, POOLED]) as run:
        inputs = tower.preprocess(pictures())
        acts = run(inputs)
        assert [list(x.shape) for x in acts.values()] == [[3, 17, 32], [3, 32]]
        tower.model.layers[0].register_forward_hook(lambda module, args, output: output[:, 1:])
        with pytest.raises(ValueError, match=r"point: residual-1 of hf:x is \[3, 16, 32\], not \[3, 17, 32\]"):
            run(inputs)


def test_what_overflows_is_left_to_who_stores_it():
    import transformers as t

    tower = wrapped(t.ViTModel(t.ViTConfig(**SMALL)))
    tower.model.layers[0].register_forward_hook(lambda module, args, output: output / 0)
    with tower.hooked([RESIDUAL]) as run:
        assert not run(tower.preprocess(pictures()))[RESIDUAL].isfinite().all()


def test_set_up_costs_three_small_forwards():
    import transformers as t

    tower, seen = wrapped(t.ViTModel(t.ViTConfig(**SMALL))), []
    tower.model.register_forward_pre_hook(lambda m, a, kw: seen.append(len(kw["pixel_values"])), with_kwargs=True)
    with tower.hooked([RESIDUAL]):
        assert seen == [2, 2, 1]


# --- tokens misnamed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "cait_xxs24_224"])
def test_class_tokens_that_come_after_the_blocks(name):
    import timm

    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
    tower = wrap_timm(randomised(timm.create_model(name, num_classes=0, **small)), f"timm:{name}")
    tower.preprocess.transform.transforms[0].size = (32, 32)
    tower.preprocess.transform.transforms[1].size = (32, 32)
    with tower.hooked([RESIDUAL]) as run:
        n_patches = tower.model.patch_embed.num_patches
        assert (run.layout.n_tokens, run.layout.n_prefix) == (n_patches, 0)
        assert run.rows_per_image(RESIDUAL, Tokens("patches")) == n_patches
        with pytest.raises(ValueError, match=r"tokens: cls, but this tower has no CLS token"):
            run.rows_per_image(RESIDUAL, Tokens("cls"))
    assert not find_anatomy(tower.model).has_cls


def test_blocks_of_pixels_of_patches():
    import timm

    model = timm.create_model("tnt_s_patch16_224", num_classes=0, embed_dim=32, depth=2, num_heads_outer=2)
    assert "its blocks give [392, 16, " in refusal(wrap_timm(randomised(model), "timm:tnt"))


def test_a_distilled_deit_has_two_tokens_before_its_patches():
    import transformers as t

    tower = wrapped(t.DeiTModel(t.DeiTConfig(**SMALL)))
    with tower.hooked([RESIDUAL]) as run:
        assert (run.layout.n_tokens, run.layout.n_prefix, run.layout.has_cls) == (18, 2, True)


# --- pooled -----------------------------------------------------------------------------------------------------------


def families(t):
    yield t.IJepaModel(t.IJepaConfig(**SMALL)), 16, "mean$"
    yield t.ViTMSNModel(t.ViTMSNConfig(**SMALL)), 17, "mean or cls$"
    yield t.InternVLVisionModel(t.InternVLVisionConfig(**SIZES, image_size=[32, 32], patch_size=[8, 8])), 17, "cls$"


def test_pooled_of_models_that_have_none():
    import transformers as t

    for model, n_tokens, instead in families(t):
        tower = wrapped(model)
        message = rf"point: pooled of hf:x: {type(model).__name__} gives none; .*{instead}"
        with pytest.raises(ValueError, match=message), tower.hooked([POOLED]):
            pass
        with tower.hooked([RESIDUAL]) as run:
            assert run.shapes[RESIDUAL] == (n_tokens, 32)


def test_a_pooling_heads_token_is_no_cls_token():
    import transformers as t

    tower = wrapped(t.Aimv2VisionModel(t.Aimv2VisionConfig(**SMALL)))
    assert not transformers_anatomy(tower.model, "x").has_cls
    with tower.hooked([RESIDUAL, POOLED]) as run:
        assert run.layout.n_prefix == 0
        acts = run(tower.preprocess(pictures()))
    with torch.inference_mode():
        expected = tower.forward(tower.preprocess(pictures())).pooler_output
    torch.testing.assert_close(acts[POOLED], expected, atol=1e-5, rtol=1e-5)
    assert "has no projection" in refusal(tower, HookPoint("projection"))


# --- what was met, and what works -------------------------------------------------------------------------------------


def test_metaclip_2_is_a_clip(tmp_path):
    import transformers as t

    text = {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = t.MetaClip2Model(t.MetaClip2Config(vision_config=SMALL, text_config=SIZES | text, projection_dim=12))
    randomised(model).save_pretrained(tmp_path)
    crop = {"height": 32, "width": 32}
    t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(tmp_path)
    tower, projection = load_tower(f"hf:{tmp_path}"), HookPoint("projection")
    with tower.hooked([projection]) as run:
        found = run(tower.preprocess(pictures()))[projection]
    with torch.inference_mode():
        expected = tower.forward(tower.preprocess(pictures())).image_embeds
    assert found.shape == (3, 12)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("archive", [True, False])
def test_weights_that_are_not_read_say_what_to_do(tmp_path, archive):
    import timm

    file, model = tmp_path / "w.pt", torch.nn.Linear(2, 2)
    if archive:
        torch.jit.trace(model, torch.zeros(1, 2)).save(file)
    else:
        torch.save(model, file)
    for spec in (f"open_clip:ViT-S-16/{file}", f"timm:{timm.list_models('test_vit')[0]}:{file}"):
        with pytest.raises(ValueError, match=r"so it is not read; save the .*as \.safetensors") as error:
            load_tower(spec)
        assert "weights_only" not in str(error.value)


def test_directories_of_other_libraries_are_named(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json is missing; it is of open_clip, give open_clip:local-dir:"):
        load_tower(f"hf:{tmp_path}")


@pytest.mark.parametrize("config", [{"model_type": "clip", "vision_config": 3}, {"model_type": "vit", "patch_size": 0}])
def test_what_a_library_raises_is_one_line_that_names_the_model(tmp_path, config):
    import transformers as t

    (tmp_path / "config.json").write_text(json.dumps(SMALL | config))
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^hf:{tmp_path}: .") as error:
        load_tower(f"hf:{tmp_path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError, AssertionError])
def test_every_kind_of_error_becomes_one_line(kind, monkeypatch):
    from saevlm_fast.towers.hub import one_line_errors

    with pytest.raises(ValueError, match=f"^hf:m: {kind.__name__}"), one_line_errors("hf:m"):
        raise kind("a\nb")
    with pytest.raises(MemoryError), one_line_errors("hf:m"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="out of memory"), one_line_errors("hf:m"):
        raise RuntimeError("CUDA out of memory")


def test_without_open_clip_the_error_names_the_package(monkeypatch):
    from saevlm_fast.towers.text import load_text_encoder

    monkeypatch.setitem(sys.modules, "open_clip", None)
    for load in (load_tower, load_text_encoder):
        with pytest.raises(ValueError, match=r"^open_clip:.*: needs the package open_clip_torch, which is"):
            load("open_clip:ViT-B-32/openai")
    with pytest.raises(ValueError, match=r"open_clip or timm$"):
        find_anatomy(torch.nn.Linear(1, 1))


def test_packages_that_not_every_tower_needs_are_imported_where_they_are_used(tmp_path, monkeypatch):
    """open_clip, timm, platformdirs: at no module's head, so that a harvest of transformers' towers does without."""
    import ast
    from pathlib import Path

    import saevlm_fast
    from saevlm_fast.harvesting.api import harvest

    for path in Path(saevlm_fast.__file__).parent.rglob("*.py"):
        heads = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = [getattr(node, "module", None) or alias.name for node in heads for alias in node.names]
        assert not {name.partition(".")[0] for name in names} & {"open_clip", "timm", "platformdirs"}, path
    for package in ("open_clip", "timm", "platformdirs"):
        monkeypatch.setitem(sys.modules, package, None)
    assert harvest("hf:tiny-clip", "scenes:test:2", layer=1, output=tmp_path / "rows", workers=0).n_rows == 2


def test_the_cache_directory_names_the_package_it_needs(monkeypatch):
    from saevlm_fast.files import cache_directory

    monkeypatch.delenv("SAEVLM_FAST_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(ValueError, match="SAEVLM_FAST_CACHE: not set, and the package platformdirs"):
        cache_directory()
