"""What SAE-V's scores of pairs have to beat: chance, exchanged omegas, the length of the text, and a CLIP.

The pairs, and the model, of a store are opened anew for that.

Shape suffixes: S latents, P pairs.
"""

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import torch

from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import renamed, require
from saevlm_fast.files import weights_sha256
from saevlm_fast.harvesting.config import COMPUTE_DTYPES
from saevlm_fast.images.batches import image_batches
from saevlm_fast.images.open import open_images
from saevlm_fast.images.pairs import WrongCaptions, caption, check_captions
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.records import object_of
from saevlm_fast.towers.language import LanguageTower, load_language
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.text import TextEncoder, load_text_encoder
from saevlm_fast.towers.tower import HookPoint, Tower

_PROJECTION = HookPoint("projection")
_AT_ONCE = 64


def shuffled_omegas(omega_S: np.ndarray, seed: int) -> np.ndarray:
    """The omegas of the scored latents in another order."""
    shuffled, scored = omega_S.copy(), np.flatnonzero(~np.isnan(omega_S))
    shuffled[scored] = np.random.default_rng(seed).permutation(omega_S[scored])
    return shuffled


def random_scores(n_pairs: int, seed: int) -> np.ndarray:
    """By which a random subset is kept."""
    return np.random.default_rng([seed, 1]).random(n_pairs)


def pairs_of(activations: Activations, images: str | None) -> ImageSource:
    """The image-text pairs that a store was harvested from, wrong captions included.

    images: where they are, if not where the store says. ValueError: it does not say; no captions there; other pairs.
    """
    source = activations.source or {}
    told = object_of(source.get("images"))
    path = images or str(told.get("path") or "")
    require(path != "", f"images: {activations.path} does not say where its pairs are; give --images")
    pairs = open_images(path)
    check_captions(pairs, path)
    there = {pairs.image_id(i) for i in range(len(pairs))}
    shards = (items["image"].unique().to_pylist() for items in activations.iter_items())
    if all(there.isdisjoint(ids) for ids in shards):
        first = next(iter(activations.iter_items()))["image"][:1].to_pylist()
        raise ValueError(f"images: {path}: none of the pairs of {activations.path} is there, as {first}")
    share = float(told.get("wrong_captions") or 0.0)
    return WrongCaptions(pairs, share, int(source.get("seed") or 0)) if share else pairs


def tower_of(
    activations: Activations, model: str | None, device: torch.device, on_message: Callable[[str], None] = print
) -> LanguageTower:
    """The language model that a store was harvested from, with its prompt.

    model: where it is, if not where the store says. ValueError: it does not say; another model; what load_language
    refuses.
    """
    source = activations.source or {}
    told = object_of(source.get("model"))
    spec = model or str(told.get("spec") or "")
    require(spec != "", f"model: {activations.path} does not say what it was harvested from; give --model")
    dtype = COMPUTE_DTYPES.get(str(source.get("dtype"))) or torch.float32
    with renamed("model"):
        tower = load_language(spec, device, dtype, told.get("prompt"), on_message)
    digest = told.get("weights_sha256")
    same = digest is None or digest == weights_sha256(tower.model)
    require(same, f"model: {spec} has other weights than the model that {activations.path} was harvested from")
    return tower


def load_clip(spec: str, device: torch.device, on_message: Callable[[str], None] = print) -> tuple[Tower, TextEncoder]:
    """Both sides of a CLIP or SigLIP.

    Raises:
        ValueError: of other kinds than load_tower and load_text_encoder know, or without projection.
    """
    known = spec.startswith(("hf:", "open_clip:"))
    require(known, f"clip: {spec!r} is not hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED")
    with renamed("clip", "model", "text_model", "point"):
        text, tower = load_text_encoder(spec, device, on_message), load_tower(spec, device, on_message)
        tower.module(_PROJECTION)
    return tower, text


def clip_cosines(
    source: ImageSource,
    ids: Sequence[str],
    clip: tuple[Tower, TextEncoder],
    on_images: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """float64 [P]: the cosine of a CLIP's image and caption, of the pairs of these ids; NaN where the source has none.

    Captions that are too long are cut, as they are no choice of the user's.
    """
    place = {name: p for p, name in enumerate(ids)}
    wanted = [i for i in range(len(source)) if source.image_id(i) in place]
    cosines = np.full(len(ids), np.nan)
    tower, text = clip
    ranges = [wanted[start : start + _AT_ONCE] for start in range(0, len(wanted), _AT_ONCE)]
    done = 0
    with (
        tower.hooked([_PROJECTION]) as run,
        closing(image_batches(source, tower.preprocess, ranges, 0, False)) as batches,
    ):
        for batch in batches:
            done += len(batch.images) + len(batch.skipped)
            if batch.inputs is not None:
                inputs = {name: tensor.to(tower.device) for name, tensor in batch.inputs.items()}
                images = torch.nn.functional.normalize(run(inputs)[_PROJECTION].float().cpu(), dim=1)
                said = text.embed([caption(source, i) for i in batch.images], refuse=False)
                places = [place[source.image_id(i)] for i in batch.images]
                cosines[places] = (images.double() * said.double()).sum(1).numpy()
            on_images(done)
    return cosines
