"""Preprocessing in fewer copies gives exactly what the library's own way does, or is not used."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from saevlm_fast.towers.preprocess import (
    ChannelsLastPreprocess,
    ComposePreprocess,
    TransformersPreprocess,
    compose_preprocess,
    transformers_preprocess,
)

SHAPES = [(375, 500), (500, 375), (32, 32), (33, 31), (16, 80), (640, 17), (1, 1), (1, 70), (224, 224), (97, 301)]


def noise(shape):
    return Image.fromarray(np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8))


def processors():
    import transformers as t

    square, crop = {"height": 32, "width": 32}, {"shortest_edge": 32}
    return {
        "clip": t.CLIPImageProcessor(size=crop, crop_size=square),
        "clip, crop larger than the image": t.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=square),
        "clip, 336": t.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        "siglip": t.SiglipImageProcessor(size=square),
        "dinov2": t.BitImageProcessor(size={"shortest_edge": 36}, crop_size=square),
        "vit": t.ViTImageProcessor(size=square),
        "vit, nearest": t.ViTImageProcessor(size=square, resample=0),
        "llava": t.LlavaImageProcessor(size=crop, crop_size=square),
    }


@pytest.mark.parametrize("name", processors())
def test_a_processors_own_pixels_in_fewer_copies(name):
    processor = processors()[name]
    preprocess, normalisation = transformers_preprocess(processor, "hf:x")
    assert isinstance(preprocess, ChannelsLastPreprocess)
    pictures = [noise(shape) for shape in SHAPES]
    expected = TransformersPreprocess(processor, raw=False)(pictures)["pixel_values"]
    for given in (preprocess, pickle.loads(pickle.dumps(preprocess))):
        pixels = given(pictures)["pixel_values"]
        assert pixels.dtype == torch.uint8
        assert pixels.permute(0, 2, 3, 1).is_contiguous() or "larger" in name  # padding lays them out anew
        assert torch.equal(normalisation(pixels), expected)
        assert normalisation(pixels).is_contiguous()
    assert torch.equal(TransformersPreprocess(processor, raw=False)(pictures)["pixel_values"], expected)  # as it was


def test_a_processor_that_does_otherwise_is_left_to_itself():
    import transformers as t

    class Mirrored(t.CLIPImageProcessor):
        def process_image(self, image, **options):
            return super().process_image(image, **options).flip(2)

    square = {"height": 32, "width": 32}
    processor = Mirrored(size={"shortest_edge": 32}, crop_size=square)
    preprocess, normalisation = transformers_preprocess(processor, "hf:x")
    assert isinstance(preprocess, TransformersPreprocess)
    pictures = [noise(shape) for shape in SHAPES]
    expected = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(normalisation(preprocess(pictures)["pixel_values"]), expected)


def test_a_compose_in_fewer_copies():
    from torchvision import transforms as v

    bicubic = v.InterpolationMode.BICUBIC
    normalise = v.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    transform = v.Compose([v.Resize(32, bicubic), v.CenterCrop(32), v.ToTensor(), normalise])
    preprocess, normalisation = compose_preprocess(transform, "timm:x")
    assert isinstance(preprocess, ComposePreprocess)
    pictures = [noise(shape) for shape in SHAPES]
    pixels = preprocess(pictures)["pixel_values"]
    assert pixels.permute(0, 2, 3, 1).is_contiguous()
    assert torch.equal(normalisation(pixels), torch.stack([transform(picture) for picture in pictures]))
