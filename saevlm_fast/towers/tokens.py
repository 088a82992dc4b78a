"""Which tokens of an image become rows: the CLS token, patches, all, their mean, or a few at random.

The choice is made on the host, from the tower's layout and the images' ids alone, and carried out on the device with
one slice or one gather, so the host never waits for the device. Shape suffixes: B images, T tokens, D width, M rows.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.errors import require

POOLED = -1  # the token position of a row that is no single token
LANGUAGE_TOKENS = ("text", "image", "last")  # kinds that language models alone have


@dataclass(frozen=True)
class Tokens:
    """A choice of tokens; made by `parse`.

    Attributes:
        kind: cls, patches (neither CLS nor registers), all, mean (over the patches) or random; of language models text,
            image, all or last.
        k: of random, tokens drawn from each image without replacement.
        from_all: of random, whether CLS and registers may be drawn too.
    """

    kind: str
    k: int = 0
    from_all: bool = False

    @classmethod
    def parse(cls, text: str) -> "Tokens":
        """From `cls`, `patches`, `all`, `mean`, `random:K` or `random:K:all`, of language models `text`, `image`, `all`
        or `last`; ValueError for anything else."""
        if text in ("cls", "patches", "all", "mean", *LANGUAGE_TOKENS):
            return cls(text)
        match = re.fullmatch(r"random:([0-9]{1,9})(:all)?", text)
        if match is None:
            raise ValueError(
                f"tokens: {text!r} is not one of cls, patches, all, mean, random:K, random:K:all; text, image, last"
            )
        require(int(match[1]) >= 1, f"tokens: K of {text!r} must be at least 1")
        return cls("random", int(match[1]), match[2] is not None)

    @property
    def name(self) -> str:
        """For file names: cls, patches, all, mean, random2, random2-all."""
        return self.kind + (str(self.k) if self.k else "") + ("-all" if self.from_all else "")


@dataclass(frozen=True)
class TokenLayout:
    """An image's token sequence: n_prefix tokens (CLS first, if there is one, then registers), then the patches.

    grid: rows and columns of the patches, which lie row by row; None where images have grids of their own.
    """

    n_tokens: int
    n_prefix: int
    has_cls: bool
    grid: tuple[int, int] | None = None

    def description(self) -> dict[str, Any]:
        """JSON: for the store."""
        grid = None if self.grid is None else list(self.grid)
        return {"n_tokens": self.n_tokens, "n_prefix": self.n_prefix, "has_cls": self.has_cls, "grid": grid}

    def rows_per_image(self, tokens: Tokens) -> int:
        """Rows that an image gives (at most, where some of its tokens may be padding).

        Raises:
            ValueError: cls of a tower without one; more random tokens than there are.
        """
        start, stop = self.span(tokens)
        language = tokens.kind in LANGUAGE_TOKENS
        require(not language, f"tokens: {tokens.kind} is for --point language; a vision tower has no such tokens")
        require(
            tokens.kind != "cls" or self.has_cls,
            "tokens: cls, but this tower has no CLS token; use mean or patches, or the point pooled",
        )
        require(
            tokens.k <= stop - start,
            f"tokens: {tokens.k} random ones without replacement, but there are {stop - start} to draw from",
        )
        return {"mean": 1, "random": tokens.k}.get(tokens.kind, stop - start)

    def span(self, tokens: Tokens) -> tuple[int, int]:
        """First position and end of the tokens that may be chosen."""
        if tokens.kind == "cls":
            return 0, 1
        return (0 if tokens.kind == "all" or tokens.from_all else self.n_prefix), self.n_tokens


class Selected(NamedTuple):
    """Rows of the chosen tokens, image by image, positions ascending within an image.

    rows_MD: on the device. positions: int64 [M] on the host, index in the tower's token sequence, POOLED where a row is
    no single token. image_of_row: int64 [M] on the host, index in the batch. details: of language models, modality int8
    [M] (numbers of language.MODALITIES) and token_id int64 [M], on the host.
    """

    rows_MD: Tensor
    positions: Tensor
    image_of_row: Tensor
    details: dict[str, Tensor] | None = None


def select_tokens(
    acts: Tensor,
    tokens: Tokens | None,
    layout: TokenLayout,
    image_ids: Sequence[str],
    seed: int = 0,
    mask_BT: Tensor | None = None,
) -> Selected:
    """The rows that `tokens` chooses from acts [B, T, D]; all of acts [B, D], whatever `tokens` is.

    Args:
        image_ids: of the batch. Random tokens depend on (seed, image id) alone, on every machine and version.
        mask_BT: bool; False marks padding, which is never chosen and never averaged. None: no padding.

    Raises:
        ValueError: an image has fewer tokens than random ones asked for (only possible with a mask; without one
            `layout.rows_per_image` says so before the first image).
    """
    if acts.ndim == 2:
        return _one_row_each(acts)
    if tokens is None:
        raise ValueError("tokens: None, but this point has tokens, of which some must be chosen")
    require(tokens.kind != "cls" or layout.has_cls, "tokens: cls, but this tower has no CLS token")
    start, stop = layout.span(tokens)
    mask_BT = None if mask_BT is None else mask_BT[:, start:stop].cpu()
    if tokens.kind == "mean":
        return _one_row_each(_mean(acts[:, start:stop], mask_BT))
    if tokens.kind != "random" and mask_BT is None:
        positions = torch.arange(start, stop).repeat(len(acts))
        return Selected(
            acts[:, start:stop].flatten(0, 1), positions, torch.arange(len(acts)).repeat_interleave(stop - start)
        )
    if mask_BT is None:
        choices: Sequence[np.ndarray] = _draw_unmasked(start, stop, tokens.k, tuple(image_ids), seed)
    else:
        choices = [start + np.flatnonzero(kept) for kept in mask_BT]
        choices = _draw(choices, tokens.k, image_ids, seed) if tokens.kind == "random" else choices
    image_of_row = torch.arange(len(acts)).repeat_interleave(torch.tensor([len(choice) for choice in choices]))
    positions = torch.from_numpy(np.concatenate(choices))
    index_M = _to_device(image_of_row * acts.shape[1] + positions, acts.device)
    return Selected(acts.flatten(0, 1).index_select(0, index_M), positions, image_of_row)


def _one_row_each(acts_BD: Tensor) -> Selected:
    return Selected(acts_BD, torch.full((len(acts_BD),), POOLED), torch.arange(len(acts_BD)))


def _mean(acts_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The mean over tokens, in float32; of half-precision tokens too."""
    if mask_BT is None:
        return acts_BTD.mean(1, dtype=torch.float32)
    padding_BT1 = _to_device(~mask_BT, acts_BTD.device)[:, :, None]
    n_tokens_B1 = _to_device(mask_BT.sum(1, dtype=torch.float32, keepdim=True), acts_BTD.device)
    return acts_BTD.masked_fill(padding_BT1, 0).sum(1, dtype=torch.float32) / n_tokens_B1


@functools.lru_cache(maxsize=8)  # every layer of a pass asks for the same images
def _draw_unmasked(start: int, stop: int, k: int, image_ids: tuple[str, ...], seed: int) -> list[np.ndarray]:
    return _draw([np.arange(start, stop)] * len(image_ids), k, image_ids, seed)


def _draw(candidates: Sequence[np.ndarray], k: int, image_ids: Sequence[str], seed: int) -> list[np.ndarray]:
    """k of each image's positions, ascending: those of the k smallest random words, whose low bits are an index.

    Raw Philox words are promised never to change (a Generator's methods are not). An id that is not valid UTF-8, as a
    file name may be, is hashed by its bytes.
    """
    philox = np.random.Philox(0)
    state: Any = philox.state  # setting it takes a tenth of making a new Philox
    drawn = []
    for positions, image_id in zip(candidates, image_ids):
        if k > len(positions):
            raise ValueError(f"tokens: {k} random ones of {image_id!r}, which has {len(positions)} to draw from")
        digest = hashlib.sha256(f"{seed}:{image_id}".encode("utf-8", "surrogateescape")).digest()
        state["state"] = {"counter": np.zeros(4, np.uint64), "key": np.frombuffer(digest[:16], "<u8").astype(np.uint64)}
        philox.state = state
        bits = np.uint64(max(1, (len(positions) - 1).bit_length()))
        words = philox.random_raw(len(positions)) >> bits << bits
        words |= np.arange(len(positions), dtype=np.uint64)
        smallest = np.partition(words, k - 1)[:k] & ((np.uint64(1) << bits) - np.uint64(1))
        drawn.append(positions[np.sort(smallest.astype(np.int64))])
    return drawn


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory a copy to a GPU does not wait for the work queued there.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
