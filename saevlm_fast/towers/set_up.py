"""What set-up asks of a tower before its rows are believed: every image keeps its own, in order, whatever is beside it.

Two images that differ in every pixel and in shape go through together, then in the other order, and one by itself: 5
images in 3 forwards. The first must be the same at both places and alone, the second the same at both places. So a
tower that loses, mixes, sorts or swaps the images of a batch, or gives an image other values another time, is found.

Rounding differs with the size of a batch. It is told from a fault by how far the two images are apart.

Shape suffixes: B images, T tokens, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.towers.forms import Cells, Form, Grid
from saevlm_fast.towers.tokens import TokenLayout


class BlockOutput(NamedTuple):
    """What a block gave of the two images: shape of its tokens [B, T, D], and the grid of its cells, if it has such."""

    shape: tuple[int, ...]
    grid: Grid | None

    @classmethod
    def of(cls, form: Form, output: Any) -> "BlockOutput":
        x = output[0] if isinstance(output, tuple) else output
        return cls(tuple(form.tokens(x).shape), form.grid(x) if isinstance(form, Cells) and x.ndim == 4 else None)


class Forward(NamedTuple):
    """acts: of every point, [B, T, D] or [B, D]. mask_BT: bool, False for padding; None: there is none."""

    acts: Mapping[Any, Tensor]
    mask_BT: Tensor | None

    def tokens(self, point: Any, i: int) -> Tensor:
        """Of image i, without padding, float32 [T, D] or [D]."""
        acts = self.acts[point][i].float()
        return acts if self.mask_BT is None or point.layer is None else acts[self.mask_BT[i].to(acts.device)]


def check_blocks(
    spec: str, outputs: Sequence[BlockOutput], n_blocks: int, n_images: int, equal: bool
) -> list[tuple[int, ...]]:
    """The shapes of what blocks gave. equal: the same T and D in all.

    Raises:
        ValueError: a block that was not called once, or does not give [B, T, D].
    """
    shapes = [output.shape for output in outputs]
    called = len(shapes) == n_blocks and all(len(shape) == 3 for shape in shapes)
    if equal:
        require(
            called and len(set(shapes)) == 1,
            f"{spec}: not a plain vision transformer, whose blocks would all give the same [B, T, D]",
        )
    require(called, f"{spec}: its {n_blocks} stages do not each give one feature map [B, C, H, W] of an image")
    require(
        shapes[0][0] == n_images,
        f"{spec}: not a plain vision transformer: its blocks give {list(shapes[0])} for {n_images} images, not "
        f"[{n_images}, T, D]",
    )
    return shapes


def check_count(spec: str, n_tokens: int, n_prefix: int, n_patches: int | None, pixels: Tensor) -> None:
    """ValueError: the tokens are not those before the patches, and the patches."""
    require(
        n_patches is None or n_tokens == n_prefix + n_patches,
        f"{spec}: {n_tokens} tokens of an image of {' x '.join(map(str, pixels.shape[2:]))}, not {n_prefix} before the "
        f"patches and {n_patches} patches",
    )


def check_point(
    spec: str, point: Any, acts: Tensor, n_images: int, layout: TokenLayout | None
) -> tuple[int | None, int]:
    """(T, D) of a point; T None of the whole image, whose layout is None. ValueError: it gives something else."""
    expected = (n_images,) if layout is None else (n_images, layout.n_tokens)
    require(
        tuple(acts.shape[:-1]) == expected, f"point: {point.name} of {spec} is {list(acts.shape)}, not one vector each"
    )
    return (None if layout is None else layout.n_tokens), acts.shape[-1]


def check_own_rows(
    spec: str, first: Forward, forward: Callable[[Sequence[Any]], Forward], pictures: Sequence[Any], half: bool
) -> None:
    """ValueError: an image's rows are not its own.

    Args:
        first: of the two pictures together. forward: pictures -> what the tower makes of them.
        half: whether matrix products are in half precision, whose rounding is coarser.
    """
    swapped, alone = forward(pictures[::-1]), forward(pictures[:1])
    for point in first.acts:
        a, b = first.tokens(point, 0), first.tokens(point, 1)
        n = min(len(a), len(b))
        allowed = _rounding(a, _norm(a[:n] - b[:n]), half)
        pairs = [(a, alone.tokens(point, 0)), (a, swapped.tokens(point, 1)), (b, swapped.tokens(point, 0))]
        if all(x.shape == y.shape and _norm(x - y) <= allowed for x, y in pairs):
            continue
        again = forward(pictures[:1]).tokens(point, 0)
        random = _norm(again - alone.tokens(point, 0)) > allowed
        raise ValueError(
            f"{spec}: {point.name} of an image is "
            + ("another one each time (a random choice in the model)" if random else "another one in a batch")
            + ", so that rows would not be the image's own"
        )


def _rounding(x: Tensor, apart: float, half: bool) -> float:
    of_difference, of_itself = (0.1, 2e-2) if half else (0.02, 1e-3)
    return of_difference * apart + of_itself * _norm(x)


def _norm(x: Tensor) -> float:
    """Of what is finite: who stores the rows says which image has overflowed."""
    return float(torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).norm())
