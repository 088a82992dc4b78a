"""What a harvest reads, by names: the tower that its points are of, and the images, with captions if it reads them."""

import os
from collections.abc import Callable

import torch

from saevlm_fast.errors import require
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.images.chosen import chosen_images
from saevlm_fast.images.open import Images, open_images
from saevlm_fast.images.pairs import WrongCaptions, check_captions
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.towers.language import LanguageTower, load_language
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tower import Tower


def open_source(images: Images, config: HarvestConfig) -> ImageSource:
    """The images, or image-text pairs, of these those that `only` lists.

    ValueError: what open_images and chosen_images refuse; pairs without captions.
    """
    named = os.fspath(images) if isinstance(images, str | os.PathLike) else ""
    source = open_images(images)
    if config.is_language:
        check_captions(source, named)
        source = WrongCaptions(source, config.wrong_captions, config.seed) if config.wrong_captions else source
    return source if config.only is None else chosen_images(source, config.only)


def tower_for(
    model: str | Tower, config: HarvestConfig, device: torch.device, on_message: Callable[[str], None] = print
) -> Tower:
    """The tower that the points are of, loaded if it is named.

    Raises:
        ValueError: a tower of the other kind, or with another prompt; what the loaders refuse.
    """
    if not isinstance(model, Tower):
        if not config.is_language:
            return load_tower(model, device, on_message)
        return load_language(model, device, config.weights_dtype, config.prompt, on_message)
    if config.is_language:
        require(isinstance(model, LanguageTower), f"model: {model.spec} is a vision tower; load_language makes others")
    if isinstance(model, LanguageTower):
        same = config.prompt == model.prompt
        require(same, f"prompt: {config.prompt!r}, but the language tower was loaded with {model.prompt!r}")
        require(
            model.dtype == config.weights_dtype,
            f"dtype: {config.dtype}, but the weights of the language tower are {model.dtype}",
        )
    return model
