"""How a tower's blocks hold the tokens of a batch, and as [B, T, D] everything else here sees them.

    BatchFirst      [B, T, D], as almost all
    SequenceFirst   [T, B, D], open_clip's older towers
    ClsLast         [B, T, D] with the class token behind the patches: Llama 4
    Tiles           [B, tiles * (T + padding), D]: Mllama pads the sequence of a tile to a multiple of 8
    Cells           [B, C, H, W]: stages of a convolutional tower; a cell of the feature map is a patch
    ListedCells     [B, H * W, C]: the same, where a stage of a Swin gives them row by row
    Packed          [sum of T, D] or [1, sum of T, D]: the patches of all images of a batch one after the other, each
                    image with a grid of its own (Qwen-VL, Pixtral). Some are not in the order of reading: Qwen-VL has
                    squares of patches that are merged later side by side, and Qwen2.5-VL windows of such squares.

Shape suffixes: B images, T tokens, D width, N tokens of all images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saevlm_fast.errors import require

Grid = tuple[int, int]  # rows and columns of an image's patches


class Form:
    """BatchFirst, and what the others change."""

    packs = False
    tile: int | None = None  # tokens of a tile, each with its own CLS, where an image's tiles are one sequence

    def tokens(self, x: Tensor) -> Tensor:
        """What a block gives, as [B, T, D]."""
        return x

    def restore(self, x_BTD: Tensor, x: Tensor) -> Tensor:
        """The inverse: x with those tokens in it, in the form that x has."""
        return x_BTD

    def grids(self, inputs: Mapping[str, Tensor]) -> list[Grid] | None:
        """Of every image, by the tower's inputs, where a batch is packed; else None."""
        return None

    def mask(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """bool [B, T], False for padding; None of towers that do not pad. (SigLIP 2 NaFlex says it itself.)"""
        mask_BT = inputs.get("pixel_attention_mask")
        return None if mask_BT is None else mask_BT.bool()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around forwards of the model, of which `tokens` and `restore` must know the images."""
        yield


class SequenceFirst(Form):
    def tokens(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)

    def restore(self, x_BTD: Tensor, x: Tensor) -> Tensor:
        return x_BTD.transpose(0, 1)


class ClsLast(Form):
    def tokens(self, x: Tensor) -> Tensor:
        return x.roll(1, dims=1)

    def restore(self, x_BTD: Tensor, x: Tensor) -> Tensor:
        return x_BTD.roll(-1, dims=1)


class Tiles(Form):
    """Of each tile n_tokens, and then padding up to a multiple; tiles of an image one after the other.

    How many tiles are in use is read from the model's own arguments while the form is watching; those that no image of
    the batch uses are left out.
    """

    def __init__(self, model: nn.Module, n_tokens: int, multiple: int):
        self.model, self.n_tokens, self.padded = model, n_tokens, -(-n_tokens // multiple) * multiple
        self.tile = n_tokens
        self._used: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._used = int(kwargs["aspect_ratio_mask"].sum(-1).max())

        handle = self.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def tokens(self, x: Tensor) -> Tensor:
        return self._tiles(x)[:, : self._used, : self.n_tokens].flatten(1, 2)

    def restore(self, x_BTD: Tensor, x: Tensor) -> Tensor:
        tiles = self._tiles(x).clone()
        tiles[:, : self._used, : self.n_tokens] = x_BTD.unflatten(1, (-1, self.n_tokens))
        return tiles.flatten(1, 2)

    def _tiles(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.padded))


class Cells(Form):
    """last: channels last, [B, H, W, C]."""

    def __init__(self, last: bool = False):
        self.last = last

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2) if self.last else x.flatten(2).transpose(1, 2)

    def restore(self, x_BTD: Tensor, x: Tensor) -> Tensor:
        return x_BTD.reshape(x.shape) if self.last else x_BTD.transpose(1, 2).reshape(x.shape)

    def grid(self, x: Tensor) -> Grid:
        return (x.shape[1], x.shape[2]) if self.last else (x.shape[2], x.shape[3])


class ListedCells(Cells):
    """The grid of the cells is not given; of a square image they are a square."""

    def tokens(self, x: Tensor) -> Tensor:
        return x

    def restore(self, x_BTD: Tensor, x: Tensor) -> Tensor:
        return x_BTD


class Packed(Form):
    """Of every image its patches in raster order, short images filled up with the first token of the batch.

    Which patches belong to which image a block's output does not say. While the form is watching, a hook on the vision
    model reads it from the model's own arguments.

    Args:
        model: the vision model that is called. grids_of: its inputs by name -> the grid of every image.
        names: what the model's arguments are called, in order. order: grid -> int64 [rows * columns], raster number ->
            place in the image's part of the sequence; None: as it is read.
    """

    packs = True

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        grids_of: Callable[[Mapping[str, Any]], list[Grid]],
        order: Callable[[Grid], Tensor] | None = None,
    ):
        self.model, self.names, self.grids_of, self.order = model, names, grids_of, order
        self._grids: list[Grid] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._grids = self.grids_of({**dict(zip(self.names, args)), **kwargs})

        handle = self.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def grids(self, inputs: Mapping[str, Tensor]) -> list[Grid]:
        return self.grids_of(inputs)

    def mask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return grid_mask(self.grids(inputs))

    def tokens(self, x: Tensor) -> Tensor:
        return self._sequence(x)[self._places()[0].to(x.device)]

    def restore(self, x_BTD: Tensor, x: Tensor) -> Tensor:
        places_BT, mask_BT = (each.to(x.device) for each in self._places())
        x_ND = self._sequence(x).clone()
        x_ND[places_BT[mask_BT]] = x_BTD[mask_BT].to(x_ND)
        return x_ND.view(x.shape)

    def _sequence(self, x: Tensor) -> Tensor:
        n, given = sum(rows * columns for rows, columns in self._grids), list(x.shape)
        plain = x.ndim == 2 or (x.ndim == 3 and len(x) == 1)
        require(plain and x.shape[-2] == n, f"a block gives {given} for {n} patches of {len(self._grids)} images")
        return x.reshape(n, x.shape[-1])

    def _places(self) -> tuple[Tensor, Tensor]:
        """Where every patch is, int64 [B, T], and bool [B, T], False of what is filled up."""
        mask_BT = grid_mask(self._grids)
        places_BT = torch.zeros(mask_BT.shape, dtype=torch.int64)
        start = 0
        for i, grid in enumerate(self._grids):
            n = grid[0] * grid[1]
            places_BT[i, :n] = start + (torch.arange(n) if self.order is None else self.order(grid))
            start += n
        return places_BT, mask_BT


def grid_mask(grids: Sequence[Grid]) -> Tensor:
    """bool [B, T]: image i has the first rows * columns of as many tokens as the largest has."""
    sizes_B = torch.tensor([rows * columns for rows, columns in grids])
    return torch.arange(int(sizes_B.max())) < sizes_B[:, None]


def merged_order(merge: int, window: int | None = None) -> Callable[[Grid], Tensor]:
    """The order of a Qwen-VL: squares of merge x merge patches, of which one token will be made, lie side by side.

    window: squares on a side of the windows that lie side by side in turn (Qwen2.5-VL); a window at the edge is
    smaller. None: squares row by row.
    """

    def order(grid: Grid) -> Tensor:
        rows, columns = grid[0] // merge, grid[1] // merge
        squares = torch.arange(rows * columns).view(rows, columns)
        if window is not None:
            row, column = torch.arange(rows)[:, None], torch.arange(columns)
            of_window = (row // window) * columns + column // window  # ascending from window to window
            place = torch.argsort(of_window.flatten(), stable=True)
            squares = torch.empty_like(place).scatter_(0, place, torch.arange(rows * columns)).view(rows, columns)
        inside = torch.arange(merge * merge).view(merge, merge)
        places = squares[:, None, :, None] * merge * merge + inside[None, :, None, :]
        return places.reshape(-1)

    return order
