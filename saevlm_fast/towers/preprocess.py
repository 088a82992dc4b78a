"""Preprocessing: each library's own, split so that worker processes hand on uint8 pixels wherever that changes nothing.

Resizing and cropping stay in the worker processes; rescaling and normalising, which would quadruple what travels,
happen on the tower's device. The split is used only after it has given two test images exactly the library's result.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.errors import first_line


@dataclass(frozen=True)
class Normalisation:
    """uint8 pixels to the tower's float32 input: (x / divisor - mean) / std, in the library's own order of operations.

    Attributes: mean, std: [3, 1, 1]. divisor: None where the library has folded it into mean and std.
    """

    mean: Tensor
    std: Tensor
    divisor: float | None = None

    def to(self, device: torch.device) -> "Normalisation":
        return Normalisation(self.mean.to(device), self.std.to(device), self.divisor)

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        scaled = pixels_BCHW.float() if self.divisor is None else pixels_BCHW.float().div_(self.divisor)
        return scaled.sub_(self.mean).div_(self.std)


class TransformersPreprocess:
    """A transformers image processor, as a worker process calls it; raw: without rescaling and normalising."""

    def __init__(self, processor: Any, raw: bool):
        self.processor = processor
        self.options = {"do_rescale": False, "do_normalize": False} if raw else {}

    def __call__(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        features = self.processor(images=list(pictures), return_tensors="pt", **self.options)
        pixels = features["pixel_values"]
        if len(pixels) != len(pictures):  # Idefics', for example, take a list for one sample
            name, shape = type(self.processor).__name__, list(pixels.shape)
            raise ValueError(f"{name} gives {shape} for {len(pictures)} images, not each its own")
        # Of tiles the first is the whole image; the others' memory must not travel with it.
        inputs = {"pixel_values": pixels[:, 0].contiguous() if pixels.ndim == 5 else pixels}
        for name in ("pixel_attention_mask", "spatial_shapes"):
            if name in features:
                inputs[name] = features[name]
        return inputs


def transformers_preprocess(processor: Any, spec: str) -> tuple[TransformersPreprocess, Normalisation | None]:
    if hasattr(processor, "image_grid_pinpoints"):  # one tile beside the whole image instead of up to 36
        size = getattr(processor, "crop_size", None) or processor.size
        side = size["height"] or size["shortest_edge"]
        processor.image_grid_pinpoints = [[side, side]]
    full = TransformersPreprocess(processor, raw=False)
    normalisation = None
    if getattr(processor, "do_rescale", False) and getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(value) for value in (processor.image_mean, processor.image_std))
        scale = 1.0 / processor.rescale_factor  # as the library folds it into mean and std
        normalisation = Normalisation((mean * scale)[:, None, None], (std * scale)[:, None, None])
    return _checked_preprocess(full, TransformersPreprocess(processor, raw=True), normalisation, spec)


class ComposePreprocess:
    """A torchvision Compose, as a worker process calls it; raw: its head up to the tensor, which stays uint8."""

    def __init__(self, transform: Any, raw: bool):
        from torchvision.transforms import Compose
        from torchvision.transforms.functional import pil_to_tensor

        self.transform = Compose([*transform.transforms[:-2], pil_to_tensor]) if raw else transform

    def __call__(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([self.transform(picture) for picture in pictures])}


def compose_preprocess(transform: Any, spec: str) -> tuple[Any, Normalisation | None]:
    """Splits a Compose that ends in ToTensor and Normalize."""
    from torchvision.transforms import Normalize, ToTensor

    full = ComposePreprocess(transform, raw=False)
    *_, to_tensor, normalize = transform.transforms
    if not (isinstance(to_tensor, ToTensor) and isinstance(normalize, Normalize)):
        return full, None
    mean, std = (
        torch.as_tensor(value, dtype=torch.float32)[:, None, None] for value in (normalize.mean, normalize.std)
    )
    return _checked_preprocess(full, ComposePreprocess(transform, raw=True), Normalisation(mean, std, 255.0), spec)


def _checked_preprocess(full: Any, raw: Any, normalisation: Normalisation | None, spec: str) -> tuple[Any, Any]:
    """`raw` and the normalisation if they give two test images exactly what `full`, the library's own way, does.

    Otherwise `full` and None: processors that rescale otherwise, or pack patches (NaFlex).
    """
    pictures = two_pictures()
    try:
        expected = full(pictures)["pixel_values"]
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{spec}: its preprocessing does not give images of one size: {first_line(error)}") from error
    if normalisation is not None and expected.ndim == 4:
        pixels = raw(pictures)["pixel_values"]
        if pixels.dtype == torch.uint8 and torch.equal(normalisation(pixels), expected):
            return raw, normalisation
    return full, None


def two_pictures() -> list[Any]:
    """Two RGB images that differ in every pixel, in shape and in which side is the longer."""
    from PIL import Image

    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 56), (64, 48))]


def described(library: str, version: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """JSON: a library's preprocessing and its version, for a tower's description."""
    return {library: version, "preprocess": {"name": name, **json.loads(json.dumps(settings, default=str))}}
