"""Preprocessing: each library's own, split so that worker processes hand on uint8 pixels wherever that changes nothing.

Resizing and cropping stay in the worker processes; rescaling and normalising, which would quadruple what travels,
happen on the tower's device. Nor are pixels laid out channel by channel before they are there: a third of a worker's
time went into that. Each of these ways is used only after it has given two test images exactly the library's result.
"""

import copy
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
        scaled = pixels_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
        if self.divisor is not None:
            scaled.div_(self.divisor)
        return scaled.sub_(self.mean).div_(self.std)


def stacked(pictures: Sequence[Tensor]) -> Tensor:
    """Images [3, H, W] as one tensor [B, 3, H, W], which lies in memory as they do: channels first, or last."""
    if pictures[0].stride(0) != 1:
        return torch.stack(list(pictures))
    return torch.stack([picture.permute(1, 2, 0) for picture in pictures]).permute(0, 3, 1, 2)


# Of processors that cut a large image into tiles, and give the whole of it beside them or not: the whole alone.
_WHOLE = {"do_image_splitting": False, "crop_to_patches": False, "do_pan_and_scan": False, "max_image_tiles": 1}
# Processors that take a list of images for one sample.
_SAMPLES = ("Idefics3ImageProcessor", "SmolVLMImageProcessor", "MllamaImageProcessor")


class TransformersPreprocess:
    """A transformers image processor, as a worker process calls it; raw: without rescaling and normalising.

    beside: names of what the tower is given beside the pixels.
    """

    def __init__(self, processor: Any, raw: bool, beside: Sequence[str] = ()):
        self.processor, self.beside = processor, tuple(beside)
        self.options = {"do_rescale": False, "do_normalize": False} if raw else {}
        self.samples = type(processor).__name__.removesuffix("Fast").removesuffix("Pil") in _SAMPLES

    def __call__(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        images = [[picture] for picture in pictures] if self.samples else list(pictures)
        features = self.processor(images=images, return_tensors="pt", **self.options)
        if "pixel_values" not in features:
            found = ", ".join(sorted(map(str, features)))
            raise ValueError(f"{type(self.processor).__name__} gives {found}, not pixel_values")
        pixels = features["pixel_values"]
        if pixels.dtype == torch.bfloat16:  # Llama 4's
            pixels = pixels.float()
        packed = "image_grid_thw" in features and pixels.ndim == 2
        n_images = len(features["image_grid_thw"] if packed else pixels)
        if n_images != len(pictures):
            name, shape = type(self.processor).__name__, list(pixels.shape)
            raise ValueError(f"{name} gives {shape} for {len(pictures)} images, not each its own")
        # Of tiles the first is the whole image; the others' memory must not travel with it.
        inputs = {"pixel_values": pixels[:, 0].contiguous() if pixels.ndim == 5 else pixels}
        for name in self.beside:
            if name in features:
                of_tiles = name == "pixel_attention_mask" and features[name].ndim == 4
                inputs[name] = features[name][:, 0].contiguous() if of_tiles else features[name]
        return inputs


class ChannelsLastPreprocess:
    """The raw TransformersPreprocess of a processor that works on tensors, which gets and gives them channels last."""

    def __init__(self, processor: Any):
        self.processor = copy.copy(processor)
        self.processor.process_image = _as_it_lies

    def __call__(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        features = self.processor(images=list(pictures), do_rescale=False, do_normalize=False)
        return {"pixel_values": stacked(features["pixel_values"])}


def _as_it_lies(picture: Any, *args: Any, **options: Any) -> Tensor:
    """In place of transformers.TorchvisionBackend.process_image, of an RGB image."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def transformers_preprocess(
    processor: Any, spec: str, beside: Sequence[str] = ()
) -> tuple[TransformersPreprocess, Normalisation | None]:
    if hasattr(processor, "image_grid_pinpoints"):  # one tile beside the whole image instead of up to 36
        size = getattr(processor, "crop_size", None) or processor.size
        side = size["height"] or size["shortest_edge"]
        processor.image_grid_pinpoints = [[side, side]]
    for name, value in _WHOLE.items():
        if hasattr(processor, name):
            setattr(processor, name, value)
    if type(processor).__name__.startswith("Llama4"):
        processor.max_patches = 1  # tiles; of other processors so many patches
    full = TransformersPreprocess(processor, False, beside)
    raw: list[Any] = [TransformersPreprocess(processor, True, beside)]
    normalisation = None
    if getattr(processor, "do_rescale", False) and getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(value, dtype=torch.float32) for value in (processor.image_mean, processor.image_std))
        scale = 1.0 / processor.rescale_factor  # as the library folds it into mean and std
        normalisation = Normalisation((mean * scale)[:, None, None], (std * scale)[:, None, None])
    if getattr(processor, "backend", None) == "torchvision" and not beside:
        raw.insert(0, ChannelsLastPreprocess(processor))
    return _checked_preprocess(full, raw, normalisation, spec)


class SquareFirst:
    """A tower's preprocessing of images that have all been resized to one square, whatever their aspect."""

    def __init__(self, preprocess: Any, side: int):
        self.preprocess, self.side = preprocess, side

    def __call__(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        from PIL import Image

        sides = self.side, self.side
        return self.preprocess([picture.resize(sides, Image.Resampling.BICUBIC) for picture in pictures])


class ComposePreprocess:
    """A torchvision Compose, as a worker process calls it; raw: its head up to the tensor, which stays uint8."""

    def __init__(self, transform: Any, raw: bool):
        from torchvision.transforms import Compose
        from torchvision.transforms.functional import pil_to_tensor

        self.transform = Compose([*transform.transforms[:-2], pil_to_tensor]) if raw else transform

    def __call__(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        return {"pixel_values": stacked([self.transform(picture) for picture in pictures])}


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
    return _checked_preprocess(full, [ComposePreprocess(transform, raw=True)], Normalisation(mean, std, 255.0), spec)


def _checked_preprocess(
    full: Any, raws: Sequence[Any], normalisation: Normalisation | None, spec: str
) -> tuple[Any, Any]:
    """The first of `raws` that with the normalisation gives two test images exactly what `full`, the library's own way,
    does.

    Otherwise `full` and None: processors that rescale otherwise, or pack patches (NaFlex).
    """
    pictures = two_pictures()
    try:
        expected = full(pictures)["pixel_values"]
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{spec}: its preprocessing does not give images of one size: {first_line(error)}") from error
    if normalisation is not None and expected.ndim == 4:
        for raw in raws:
            if _gives_the_same(raw, normalisation, pictures, expected):
                return raw, normalisation
    return full, None


def _gives_the_same(raw: Any, normalisation: Normalisation, pictures: list[Any], expected: Tensor) -> bool:
    try:
        pixels = raw(pictures)["pixel_values"]
    except Exception:  # a processor of another kind than taken for, whose own way is at hand
        return False
    return pixels.dtype == torch.uint8 and torch.equal(normalisation(pixels), expected)


def two_pictures() -> list[Any]:
    """Two RGB images that differ in every pixel, in shape and in which side is the longer."""
    from PIL import Image

    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 56), (64, 48))]


def described(library: str, version: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """JSON: a library's preprocessing and its version, for a tower's description."""
    return {library: version, "preprocess": {"name": name, **json.loads(json.dumps(settings, default=str))}}
