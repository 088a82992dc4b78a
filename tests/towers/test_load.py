"""Every kind of tower of transformers, from files: hook points against the library's own outputs."""

import json
import pickle
import re
import shutil

import pytest
import torch
from narrow_towers import (
    N_BLOCKS,
    N_PATCHES,
    PLAIN_BLOCKS,
    PREFIX,
    WIDTH,
    assert_same,
    noise,
    processed,
    run_all,
    vision_part,
)

from saevlm_fast.towers.from_transformers import wrap_transformers
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint


@pytest.mark.parametrize("name", PREFIX)
def test_residual_is_the_librarys_hidden_state(saved, name):
    directory, model, processor = saved(name)
    tower = load_tower(f"hf:{directory}")
    assert tower.n_blocks == N_BLOCKS
    pictures = noise()
    acts = run_all(tower, pictures)
    with torch.inference_mode():
        states = vision_part(model)(**processed(processor, pictures), output_hidden_states=True).hidden_states
    for layer in range(N_BLOCKS - 1):  # some families put the final norm into the last one
        assert_same(acts[HookPoint("residual", layer)], states[layer + 1])
    n_tokens = 20 if name == "naflex" else PREFIX[name] + N_PATCHES
    assert acts[HookPoint("mlp", 0)].shape == (3, n_tokens, WIDTH)


@pytest.mark.parametrize("name", PREFIX)
def test_attention_and_mlp_add_up_to_the_residual(saved, name):
    tower = load_tower(f"hf:{saved(name)[0]}")
    acts = run_all(tower, noise())
    for layer in range(1, N_BLOCKS):
        attention, mlp = acts[HookPoint("attention", layer)], acts[HookPoint("mlp", layer)]
        if name not in PLAIN_BLOCKS:
            block = tower.anatomy.blocks[layer]
            attention = attention * block.layer_scale1.lambda1
            mlp = mlp * block.layer_scale2.lambda1
        total = acts[HookPoint("residual", layer - 1)] + attention + mlp
        torch.testing.assert_close(acts[HookPoint("residual", layer)], total, atol=1e-4, rtol=1e-5)


def test_clip_projection_is_get_image_features(saved):
    directory, model, processor = saved("clip")
    acts = run_all(load_tower(f"hf:{directory}"), noise(), [HookPoint("pooled"), HookPoint("projection")])
    with torch.inference_mode():
        pixels = processed(processor, noise())
        features = model.get_image_features(**pixels)
        pooled = model.vision_model(**pixels).pooler_output
    assert_same(acts[HookPoint("projection")], getattr(features, "pooler_output", features))
    assert_same(acts[HookPoint("pooled")], pooled)


@pytest.mark.parametrize("name", ["siglip", "naflex"])
def test_siglip_pooled_is_get_image_features(saved, name):
    directory, model, processor = saved(name)
    acts = run_all(load_tower(f"hf:{directory}"), noise(), [HookPoint("pooled"), HookPoint("projection")])
    with torch.inference_mode():
        features = model.get_image_features(**processed(processor, noise()))
    for tensor in acts.values():
        assert_same(tensor, getattr(features, "pooler_output", features))


@pytest.mark.parametrize("name", ["clip_vision", "vit", "dinov2", "dinov2_registers", "dinov3", "llava"])
def test_pooled_is_the_librarys_pooler_output(saved, name):
    directory, model, processor = saved(name)
    acts = run_all(load_tower(f"hf:{directory}"), noise(), [HookPoint("pooled")])
    with torch.inference_mode():
        expected = vision_part(model)(**processed(processor, noise())).pooler_output
    assert_same(acts[HookPoint("pooled")], expected)


def test_pooled_of_a_vit_without_pooler_is_the_normed_cls_token(saved):
    directory, model, processor = saved("vit_classifier")
    acts = run_all(load_tower(f"hf:{directory}"), noise(), [HookPoint("pooled")])
    with torch.inference_mode():
        expected = model.vit(**processed(processor, noise())).last_hidden_state[:, 0]
    assert_same(acts[HookPoint("pooled")], expected)


def test_only_the_tower_of_a_llava_is_loaded_and_all_of_it(saved):
    directory, model, _ = saved("llava")
    tower = load_tower(f"hf:{directory}")
    expected = {name: tensor for name, tensor in model.model.vision_tower.state_dict().items()}
    assert tower.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tower.model.state_dict().items())


@pytest.mark.parametrize("name", ["llava", "vit", "clip"])
def test_missing_weights_are_refused(saved, tmp_path, name):
    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(saved(name)[0], tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    vision = [key for key in weights if "text" not in key and "language" not in key]
    lost = next(key for key in vision if "mlp.fc1.weight" in key or "intermediate.dense.weight" in key)
    shape = list(weights[lost].shape)
    cut = [shape[0] - 1, shape[1]]
    save_file(weights | {lost: weights[lost][:-1]}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"fc1.weight is {re.escape(f'{cut} in the weights file, but {shape} by')}"):
        load_tower(f"hf:{directory}")
    del weights[lost]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of \w+ are missing, as .*fc1"):
        load_tower(f"hf:{directory}")
    (directory / "model.safetensors").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"model: its weights file is cut off, damaged or no safetensors file"):
        load_tower(f"hf:{directory}")


@pytest.mark.parametrize("name", PREFIX)
def test_preprocessing_is_the_librarys_bit_by_bit(saved, name):
    directory, _, processor = saved(name)
    tower = load_tower(f"hf:{directory}")
    inputs = pickle.loads(pickle.dumps(tower.preprocess))(noise())
    assert inputs["pixel_values"].dtype == (torch.float32 if name == "naflex" else torch.uint8)
    seen = {}
    tower.anatomy.call = lambda model, given: seen.update(given)
    tower.forward(inputs)
    expected = processed(processor, noise())
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[key], expected[key]) for key in expected)


def test_padding_of_naflex_is_never_chosen(saved):
    tower = load_tower(f"hf:{saved('naflex')[0]}")
    pictures = noise(2, (30, 90))
    inputs = tower.preprocess(pictures)
    mask = tower.token_mask(inputs)
    assert mask.dtype == torch.bool
    assert not mask.all()
    point = HookPoint("residual", 1)
    with tower.hooked([point]) as run:
        acts = run(inputs)[point]
        alone = run(tower.preprocess(pictures[:1]))[point]
        patches = run.select(acts, Tokens("patches"), ["a", "b"], inputs=inputs)
        mean = run.select(acts, Tokens("mean"), ["a", "b"], inputs=inputs)
        drawn = run.select(acts, Tokens.parse("random:9"), ["a", "b"], inputs=inputs)
        with pytest.raises(ValueError, match="random ones of 'a', which has"):
            run.select(acts, Tokens.parse("random:20"), ["a", "b"], inputs=inputs)
    assert torch.equal(patches.rows_MD, acts[mask])
    expected = torch.stack([acts[i][mask[i]].mean(0) for i in range(2)])
    torch.testing.assert_close(mean.rows_MD, expected, atol=1e-6, rtol=1e-5)
    assert all(mask[image, position] for image, position in zip(drawn.image_of_row, drawn.positions))
    torch.testing.assert_close(alone[0][mask[0]], acts[0][mask[0]], atol=1e-5, rtol=1e-5)


def test_description_is_json_and_knows_the_weights(saved):
    first = load_tower(f"hf:{saved('clip')[0]}")
    description = json.loads(json.dumps(first.description()))
    assert description["class"] == "CLIPVisionModelWithProjection"
    assert description["preprocess"]["image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert description == load_tower(f"hf:{saved('clip')[0]}").description()
    with torch.no_grad():
        first.model.visual_projection.weight[0, 0] += 1
    assert first.description()["weights_sha256"] != description["weights_sha256"]


def test_clip_large_336_in_its_true_depth_and_width(monkeypatch):
    """The paper's tower and layers, one image. The MLPs' inner width, which no point shows, is a sixteenth; that images
    are alone what they are together is tried on small towers."""
    monkeypatch.setattr("saevlm_fast.towers.tower.check_own_rows", lambda *arguments: None)
    import transformers as t

    vision = t.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=256,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device("meta"):
        model = t.CLIPVisionModelWithProjection(vision)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 20, generator=generator) * 0.02
    with torch.no_grad():
        for parameter in model.parameters():  # random numbers repeated: to draw them all takes longer than the forward
            parameter.copy_(block.repeat(-(-parameter.numel() // len(block)))[: parameter.numel()].view_as(parameter))
        model.vision_model.embeddings.position_ids.copy_(torch.arange(577)[None])
    processor = t.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    tower = wrap_transformers(model, processor, "hf:openai/clip-vit-large-patch14-336")
    points = [HookPoint("residual", layer) for layer in (11, 17, 22, 23)] + [HookPoint("projection")]
    with tower.hooked(points) as run:
        assert run.shapes == dict.fromkeys(points[:4], (577, 1024)) | {points[4]: (None, 768)}
        assert [run.rows_per_image(points[0], Tokens(kind)) for kind in ("cls", "patches", "all")] == [1, 576, 577]
        assert all(acts.isfinite().all() for acts in run(tower.preprocess(noise(1))).values())
