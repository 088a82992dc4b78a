"""Steered answers in batches beside one generation for every pair of image and latent, on the box's tiny-llava."""

from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from saevlm_fast.box.scenes import Scenes
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.steering.edits import clamp, steer
from saevlm_fast.towers.text import load_llava

LAYER, ALPHA, TOKENS = 3, 40.0, 4
PROMPT = "What colour is the object?"


@dataclass(frozen=True)
class Pairs:
    """Every latent is clamped on every image."""

    n_images: int
    n_latents: int


PAIRS = {"smoke": Pairs(2, 2), "tiny-llava": Pairs(4, 12)}


@pytest.fixture(params=PAIRS)
def case(request):
    return PAIRS[request.param]


@pytest.fixture
def setting(case, device):
    """llava, processor, an SAE x4 with random weights, pictures, latents."""
    torch.manual_seed(0)
    llava, processor = load_llava("hf:tiny-llava", device)
    sae = SparseAutoencoder(SAEConfig(128, 512, 10, "topk")).to(device).eval()
    pictures = [Image.fromarray(pixels) for pixels in Scenes(0, "test").batch(0, case.n_images).images]
    return llava, processor, sae, pictures, range(case.n_latents)


def batched(llava, processor, sae, pictures, latents):
    """The images' forward included."""
    answerer = SteeredAnswers(llava, processor, sae, LAYER, max_new_tokens=TOKENS)
    questions = [answerer.ask(picture, PROMPT) for picture in pictures]
    return answerer.answers([SteeredRow(q, (clamp(k, ALPHA),)) for q in questions for k in latents])


def one_at_a_time(llava, processor, sae, pictures, latents):
    """The paper's way: the whole model for every pair. An image is preprocessed once."""
    text = f"user: <image> {PROMPT} assistant:"
    answers = []
    for picture in pictures:
        inputs = processor(text=[text], images=[picture], return_tensors="pt").to(llava.device)
        for k in latents:
            with steer(llava, sae, LAYER, [clamp(k, ALPHA)]):
                tokens = llava.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            answers.append(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
    return answers


@pytest.mark.parametrize("impl", ["batched"])  # the reference, which takes the time, is timed between its rounds
def test_steered_answers(measure, setting, case, impl):
    n_pairs = case.n_images * case.n_latents
    ways = {way.__name__: (lambda way=way: way(*setting), {"answers/s": n_pairs}) for way in (batched, one_at_a_time)}

    def check():
        assert batched(*setting) == one_at_a_time(*setting)

    measure("steered answers", impl, ways, check=check, shape={"images": case.n_images, "latents": case.n_latents},
            dtype="float32", reference="one_at_a_time")  # fmt: skip
