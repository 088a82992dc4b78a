"""Where other models are steered: tiles, layers that are read, towers alone, LLaVA-1.5 in its true shape."""

from functools import partial

import pytest
import torch
from steered import (
    ALPHA,
    LAYER,
    assigned,
    by_hand,
    language_settings,
    random_sae,
    residual,
    small_next,
    small_onevision,
    vision_settings,
)

from saevlm_fast.steering.edits import clamp, steer, steer_rows
from saevlm_fast.steering.site import blocks_read
from saevlm_fast.towers.load import find_anatomy


@torch.no_grad()
def features(model, pixels, sizes):
    return torch.cat(list(model.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output))


def tiled(n_tiles):
    """Two images cut into 1 + 2 and 1 + 4 tiles, as the processors give them."""
    pixels = torch.randn(2, 5, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return pixels, torch.tensor([[28, 56], [56, 56]])


@pytest.mark.parametrize(("build", "last_read"), [(small_next, 2), (small_onevision, 3)])
def test_tiles_of_an_image_are_edited_alike(build, last_read):
    torch.manual_seed(0)
    model, sae = build(), random_sae(32)
    pixels, sizes = tiled(5)
    if build is small_onevision:
        sizes = torch.tensor([[56, 28], [56, 56]])
    x = residual(model, partial(features, model, pixels, sizes), layer=last_read)
    assert x.shape[0] == 8  # 3 and 5 tiles
    with steer_rows(model, sae, last_read, [[clamp(5, ALPHA)], [clamp(6, ALPHA)]], tiles=[3, 5]):
        steered = residual(model, partial(features, model, pixels, sizes), layer=last_read)
        changed = features(model, pixels, sizes)
    everywhere = torch.ones(x.shape[:2], dtype=torch.bool)
    for rows, latent in ((slice(0, 3), 5), (slice(3, 8), 6)):
        expected = by_hand(sae, x[rows], assigned(latent, lambda z: ALPHA), everywhere[rows], "drop")
        torch.testing.assert_close(steered[rows], expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(changed, features(model, pixels, sizes))
    if last_read == 2:
        with pytest.raises(ValueError, match=r"^layer: 3 changes nothing"), steer(model, sae, 3):
            pass


def test_onevision_has_no_cls_token():
    message = "^tokens: cls, but the vision tower of LlavaOnevisionForConditionalGeneration has no CLS token$"
    with pytest.raises(ValueError, match=message), steer(small_onevision(), random_sae(32), 1, tokens="cls"):
        pass


@pytest.mark.parametrize(("chosen", "read"), [(-2, {2}), (-1, {3}), (3, {2}), ([1, -2], {0, 2}), ([0, -5], {-1})])
def test_which_blocks_are_read(chosen, read):
    """As transformers counts hidden states: number 0 is the embeddings, one more than blocks in all."""
    torch.manual_seed(0)
    model = small_next(vision_feature_layer=chosen)
    assert blocks_read(model, 4) == read
    pixels, sizes = tiled(5)
    before, changed = features(model, pixels, sizes), set()
    for layer, block in enumerate(find_anatomy(model).blocks):
        handle = block.register_forward_hook(lambda module, args, output: output * 2, prepend=True)
        if not torch.equal(features(model, pixels, sizes), before):
            changed.add(layer)
        handle.remove()
    assert changed == set(range(max(read) + 1))


@pytest.mark.parametrize(
    "family", ["CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel", "SiglipVisionModel", "open_clip"]
)
@torch.no_grad()
def test_towers_without_a_language_model(family):
    torch.manual_seed(0)
    if family == "open_clip":
        import open_clip

        model = open_clip.transformer.VisionTransformer(
            image_size=28, patch_size=14, width=32, layers=4, heads=2, mlp_ratio=2.0, output_dim=16
        ).eval()
        run = lambda: model(pixels)  # noqa: E731
    else:
        import transformers as t

        kind = "CLIP" if "CLIP" in family else "Siglip"
        vision = getattr(t, f"{kind}VisionConfig")(**vision_settings())
        text = {k: v for k, v in language_settings().items() if k != "num_key_value_heads"}
        text |= {"max_position_embeddings": 8}
        config = (
            vision
            if "Vision" in family
            else getattr(t, f"{kind}Config")(text_config=text, vision_config=vision.to_dict())
        )
        model = getattr(t, family)(config).eval()
        if "Vision" in family:
            run = lambda: model(pixels).pooler_output if "WithP" not in family else model(pixels).image_embeds  # noqa: E731
        else:
            run = lambda: model.get_image_features(pixel_values=pixels).pooler_output  # noqa: E731
    pixels, sae = torch.randn(2, 3, 28, 28), random_sae(32)
    before, x = run(), residual(model, run)
    with steer(model, sae, LAYER, [clamp(5, ALPHA)], tokens="patches"):
        steered, embedded = residual(model, run), run()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[:, : find_anatomy(model).n_prefix] = False
    assert int(mask.sum()) == 2 * 4
    expected = by_hand(sae, x, assigned(5, lambda z: ALPHA), mask, "drop")
    torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(embedded, before)
    assert torch.equal(run(), before)


@torch.no_grad()
def test_the_tower_of_llava_1_5_in_its_true_shape():
    """CLIP-L/14-336 at layer 22, of which the projector reads the output; the language model is small.

    Blocks 1 to 20 are there, but hand on what they are given: their arithmetic would be most of this test's time.
    """
    import transformers as t

    vision = t.CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
                                image_size=336, patch_size=14, projection_dim=768)  # fmt: skip
    with torch.device("meta"):
        config = t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**language_settings()))
        model = t.LlavaForConditionalGeneration(config)
    model = model.to_empty(device="cpu").eval()
    first, *others = model.model.vision_tower.encoder.layers
    for block in others:  # equal weights in all blocks: random ones for each would take longer than the test
        block.load_state_dict(first.state_dict(), assign=True)
    for block in others[:20]:
        block.forward = lambda x, *args, **kwargs: x
    for parameter in {parameter.data_ptr(): parameter for parameter in model.parameters()}.values():
        parameter.uniform_(-0.02, 0.02)
    model.model.vision_tower.embeddings.position_ids.copy_(torch.arange(577))
    pixels, sae = torch.randn(1, 3, 336, 336), random_sae(1024, d_sae=2048)
    run = lambda: model.get_image_features(pixel_values=pixels).pooler_output[0]  # noqa: E731
    block, untouched, read = find_anatomy(model).blocks[22], [], []
    with steer(model, sae, 22, [clamp(5, 100.0)]):
        # A hook before the steering's own keeps what it is given.
        block.register_forward_hook(lambda module, args, output: untouched.append(output), prepend=True)
        steered = residual(model, lambda: read.append(run()), layer=22)
    (x,) = untouched
    assert x.shape == (1, 577, 1024)
    expected = by_hand(sae, x, assigned(5, lambda z: 100.0), torch.ones(1, 577, dtype=torch.bool), "drop")
    torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(read[0], model.model.multi_modal_projector(expected[0, 1:]), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="layer: 23 changes nothing, the language model reads vision blocks up to 22"):
        steer(model, sae, 23).__enter__()
