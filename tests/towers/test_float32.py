"""float32 means float32 wherever a model runs: torch's own default for convolutions on a GPU is TF32."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.towers.from_transformers import wrap_transformers
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.text import load_text_encoder
from saevlm_fast.towers.tower import HookPoint
from tiny_tower import save_clip

POINTS = [HookPoint("residual", 1), HookPoint("projection")]


@pytest.fixture(autouse=True)
def as_with_a_gpu(monkeypatch):
    """Precision is a setting of a GPU alone; torch keeps it without one."""
    if not torch.cuda.is_available():
        monkeypatch.setattr("saevlm_fast.runtime._has_gpu", lambda: True)


def precisions():
    return {setting.fp32_precision for setting in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)}


@contextmanager
def seen_by(modules):
    """What products and convolutions are set to whenever one of the modules has run; TF32 was set before."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before, seen = [setting.fp32_precision for setting in settings], []
    handles = [module.register_forward_hook(lambda *_: seen.append(precisions())) for module in modules]
    for setting in settings:
        setting.fp32_precision = "tf32"
    try:
        yield seen
        assert precisions() == {"tf32"}, "was not given back"
    finally:
        for handle in handles:
            handle.remove()
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return load_tower(f"hf:{save_clip(tmp_path_factory.mktemp('clip'))}")


def noise(n=2, side=40):
    return list(np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize(("tf32", "precision"), [(False, "ieee"), (True, "tf32")])
def test_a_tower_runs_in_the_precision_asked_for(tower, tf32, precision):
    with seen_by(tower.anatomy.blocks) as seen:
        inputs = tower.inputs_of(noise())
        tower.forward(inputs, tf32)
        with tower.hooked(POINTS, tf32=tf32) as run:
            run(inputs)
    assert seen == [{precision}] * len(seen)
    assert len(seen) >= 5 * tower.n_blocks  # the whole one, the set-up's three, the hooked one


def test_texts_are_embedded_in_float32(tmp_path):
    from saevlm_fast.box_making.architecture import build_clip, clip_processor

    build_clip().save_pretrained(tmp_path)
    clip_processor().save_pretrained(tmp_path)
    encoder = load_text_encoder(f"hf:{tmp_path}")
    with seen_by([]) as seen:

        def project(texts):
            seen.append(precisions())
            return encoder.project(texts)

        replace(encoder, project=project).embed(["a red circle"])
    assert seen == [{"ieee"}]


def test_answers_are_given_in_the_models_own_precision():
    from saevlm_fast.box_making.architecture import build_clip, build_llava, llava_processor

    torch.manual_seed(0)
    llava = build_llava(build_clip()).eval().requires_grad_(False)
    sae = SparseAutoencoder(SAEConfig(128, 96, 8, "topk")).eval()
    answerer = SteeredAnswers(llava, llava_processor(), sae, layer=2, max_new_tokens=2)
    with seen_by([llava.model.language_model, *answerer.site.anatomy.blocks]) as seen:
        question = answerer.ask(noise(1, 64)[0], "What colour is the object?")
        answerer.answers([SteeredRow(question, ())])
    assert len(seen) > 3
    assert seen == [{"ieee"}] * len(seen)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(32, 8), (224, 16)])
def test_a_tower_on_a_gpu_has_the_values_of_float64(size):
    """TF32 anywhere, in the patch embedding or the blocks, is off by 5e-4 of the largest value and more."""
    import transformers as t

    side, patch = size
    config = t.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=64,
        image_size=side,
        patch_size=patch,
    )
    torch.manual_seed(0)
    model = t.CLIPVisionModelWithProjection(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    processor = t.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tower = wrap_transformers(model, processor, "hf:x", "cuda")
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        inputs = tower.inputs_of(noise(4, 300))
        with tower.hooked(POINTS) as run:
            found = {point: acts.double().cpu() for point, acts in run(inputs).items()}
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    tower.model.double()
    pixels = tower._normalisation(inputs["pixel_values"]).double()
    with torch.inference_mode():
        expected = tower.model(pixel_values=pixels, output_hidden_states=True)
    for point, values in ((POINTS[0], expected.hidden_states[2]), (POINTS[1], expected.image_embeds)):
        assert float((found[point] - values.cpu()).abs().max() / values.abs().max()) < 1e-5, point
