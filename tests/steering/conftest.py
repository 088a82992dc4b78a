"""What the tests of this folder share."""

import numpy as np
import pytest
import torch
from steered import PROMPT
from steering_scores import DEAD, LAYER, N_IMAGES, S

from command import run
from saevlm_fast.box_making.architecture import build_clip, build_llava, clip_processor, llava_processor
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import open_codes
from saevlm_fast.data.rows import open_activations
from saevlm_fast.images.open import open_images
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import SteeredAnswers
from saevlm_fast.towers.text import load_llava, load_text_encoder
from tiny_tower import save_photos


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    model = build_llava(build_clip()).eval().requires_grad_(False)
    for block in model.model.vision_tower.modules():  # the library's initialisation gives all images nearly one answer
        if isinstance(block, torch.nn.Linear):
            torch.nn.init.normal_(block.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    return list(noise)


@pytest.fixture(scope="module")
def inputs(pictures):
    texts = [f"user: <image> {PROMPT} assistant:"] * len(pictures)
    return dict(llava_processor()(text=texts, images=pictures, return_tensors="pt"))


@pytest.fixture(scope="session")
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
