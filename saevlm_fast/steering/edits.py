"""Steering: a vision tower's residual stream changed through an SAE's latents, by forward hooks on an untouched model.

    with steer(llava, sae, layer=22, edits=[clamp(1234, 100.0)]):
        tokens = llava.generate(**inputs)

At the chosen tokens the output x of block `layer` becomes, with z = encode(x) and z' = z after the edits,

    error="drop"    decode(z')                      the paper: what the SAE cannot reconstruct is lost (recipe.md 4)
    error="keep"    x + decode(z') - decode(z)      the change alone

computed as decode(z) + sum_j (z'_j - z_j) W_dec[j], and as x + the same sum: a latent is only looked up, however many
there are, and no edits at error="keep" leave x as it is to the last bit. Latents are in raw activation units, encoded
as at inference (threshold or row-wise top k), in the SAE's dtype and on its device; the result returns to the model's.

Nothing of a model is replaced: one hook, gone afterwards, also after an error. It comes before the library's own hooks,
so hidden states that the model collects (LLaVA's vision_feature_layer) hold the edited stream. Of nested steerings of
one block the inner acts first. Code compiled by torch.compile does not see new hooks, so it rests while a steering is
on: everything runs eagerly, and the compiled code is used again, unchanged, afterwards.

Shape suffixes: B rows of the block (images, or their tiles), T tokens, D width, N tokens of all rows, J edits.
"""

import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saevlm_fast.data.codes import CodeRows, codes_of_rows
from saevlm_fast.errors import require
from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.kernels.sparse_decode import sparse_decode
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.towers.load import find_anatomy
from saevlm_fast.towers.tower import Anatomy

ERRORS, TOKENS = ("drop", "keep"), ("all", "patches", "cls")
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Edit:
    """A latent's new value, factor * z + offset. Made by `clamp`, `add`, `scale` and `zero`.

    Raises:
        ValueError: a latent that is no whole number or below 0, a value that is not finite in float32.
    """

    latent: int
    factor: float
    offset: float

    def __post_init__(self) -> None:
        whole = isinstance(self.latent, Integral) and not isinstance(self.latent, bool)
        require(whole, f"latent: {self.latent!r} is not a whole number")
        require(self.latent >= 0, f"latent: {self.latent} must not be negative")
        for value in (self.factor, self.offset):
            fits = math.isfinite(value) and abs(value) <= _LARGEST
            require(fits, f"alpha: {value} of latent {self.latent} is not finite in float32")


def clamp(latent: int, alpha: float) -> Edit:
    """The latent is alpha, wherever it fires or not; in raw activation units."""
    return Edit(latent, 0.0, alpha)


def add(latent: int, alpha: float) -> Edit:
    """alpha more, wherever the latent fires or not; in raw activation units."""
    return Edit(latent, 1.0, alpha)


def scale(latent: int, factor: float) -> Edit:
    """factor times as much, where the latent fires."""
    return Edit(latent, factor, 0.0)


def zero(latent: int) -> Edit:
    """The latent does not fire."""
    return Edit(latent, 0.0, 0.0)


@contextmanager
def steer(
    model: nn.Module,
    sae: SparseAutoencoder,
    layer: int,
    edits: Sequence[Edit] = (),
    *,
    only: bool = False,
    tokens: str | Tensor = "all",
    error: str = "drop",
) -> Iterator[None]:
    """Inside `with`, the model's vision tower is steered after block `layer` (from 0), the same way in every row.

    In all threads that run this model; compiled code of the whole process runs eagerly meanwhile.

    Args:
        model: transformers' LLaVA-1.5, -NeXT, -OneVision, CLIP or SigLIP, whole or the vision part alone; open_clip's
            or timm's model. Its dtype and device are its own.
        sae: of the residual stream after that block.
        edits: no latent twice. None at all is the identity control: the SAE is attached, nothing is changed.
        only: every latent without an edit becomes 0 (scale(k, 1.0) leaves k alone as it is).
        tokens: all, patches, cls, or a bool mask [T] or [B, T] over the tower's token sequence, CLS first.
        error: drop or keep, see the module's docstring.

    Raises:
        ValueError: in one line: no such layer, one that the language model does not read (or whose CLS token it does
            not), a width that is not the SAE's, a latent that is not there or is edited twice, an unknown choice; at
            the forward, a mask that does not fit the tokens.
    """
    site = find_site(model, sae, layer, tokens, error)
    plan = EditPlan.of_rows([edits], sae)
    with hooked_block(site, lambda x_BTD: _steered(x_BTD, sae, plan, site, only, tokens, error, None)):
        yield


@contextmanager
def steer_rows(
    model: nn.Module,
    sae: SparseAutoencoder,
    layer: int,
    rows: Sequence[Sequence[Edit]],
    *,
    tiles: Sequence[int] | None = None,
    only: bool = False,
    tokens: str | Tensor = "all",
    error: str = "drop",
) -> Iterator[None]:
    """As `steer`, but row b of the batch is edited by rows[b].

    Args:
        tiles: how many rows of the tower belong to each row of the batch, where an image is cut into tiles (LLaVA-NeXT,
            OneVision); all tiles of an image are edited alike. None: one each. A mask [B, T] counts tiles.

    Raises:
        ValueError: as `steer`; at the forward, a batch of another size.
    """
    site = find_site(model, sae, layer, tokens, error)
    n_tiles = torch.ones(len(rows), dtype=torch.int64) if tiles is None else torch.tensor([int(n) for n in tiles])
    require(len(n_tiles) == len(rows), f"tiles: {len(n_tiles)} numbers for {len(rows)} rows")
    require(not bool((n_tiles < 1).any()), f"tiles: {n_tiles.tolist()}, each must be at least 1")
    plan = EditPlan.of_rows(rows, sae)
    row_of_tile = torch.arange(len(rows)).repeat_interleave(n_tiles)
    with hooked_block(site, lambda x_BTD: _steered(x_BTD, sae, plan, site, only, tokens, error, row_of_tile)):
        yield


# --- where -----------------------------------------------------------------------------------------------------------


class Site(NamedTuple):
    """A block whose output is steered, and what is known of its tower. reads: see `blocks_read`."""

    anatomy: Anatomy
    layer: int
    reads: frozenset[int] | None

    @property
    def block(self) -> nn.Module:
        """If torch.compile wrapped it by itself, the inner one: from that the model collects hidden states."""
        block = self.anatomy.blocks[self.layer]
        return getattr(block, "_orig_mod", block)


def find_site(
    model: nn.Module, sae: SparseAutoencoder, layer: int, tokens: str | Tensor = "all", error: str = "drop"
) -> Site:
    """The block, after all checks that need no forward. Raises the ValueErrors of `steer`."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile returns is a wrapper
    anatomy, name = find_anatomy(model), type(model).__name__
    last = len(anatomy.blocks) - 1
    require(0 <= layer <= last, f"layer: {layer} of {name}, whose vision blocks are 0 to {last}")
    require(
        anatomy.width in (None, sae.config.d_in),
        f"sae: d_in is {sae.config.d_in}, but the vision blocks of {name} have width {anatomy.width}",
    )
    layer = operator.index(layer)
    require(error in ERRORS, f"error: {error!r} is not one of {', '.join(ERRORS)}")
    mask = isinstance(tokens, Tensor) and tokens.dtype == torch.bool and tokens.ndim in (1, 2)
    known = mask or (isinstance(tokens, str) and tokens in TOKENS)
    require(known, f"tokens: {_shown(tokens)} is not one of {', '.join(TOKENS)}, or a bool mask [T] or [B, T]")
    chosen = True if isinstance(tokens, str) else bool(tokens.any())
    require(chosen, "tokens: the mask chooses none, so that steering changes nothing")
    cls_only = tokens == "cls" if isinstance(tokens, str) else anatomy.has_cls and not bool(tokens[..., 1:].any())
    require(anatomy.has_cls or not cls_only, f"tokens: cls, but the vision tower of {name} has no CLS token")
    reads = blocks_read(model, len(anatomy.blocks))
    if reads is not None:
        _check_read(model.config, layer, reads, cls_only)
    return Site(anatomy, layer, reads)


def blocks_read(model: Any, n_blocks: int) -> frozenset[int] | None:
    """The vision blocks whose output a LLaVA's projector is given (-1: the embeddings); None of a model without one.

    vision_feature_layer counts hidden states, of which there is one more than blocks: -2 is the last block but one.
    """
    chosen = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if chosen is None:
        return None
    return frozenset(index % (n_blocks + 1) - 1 for index in ([chosen] if isinstance(chosen, int) else chosen))


def _check_read(config: Any, layer: int, reads: frozenset[int], cls_only: bool) -> None:
    last_read = max(reads)
    what = f"(vision_feature_layer {config.vision_feature_layer})"
    require(
        layer <= last_read,
        f"layer: {layer} changes nothing, the language model reads vision blocks up to {last_read} {what}",
    )
    drops_cls = getattr(config, "vision_feature_select_strategy", "full") == "default"
    require(
        not (cls_only and drops_cls and layer == last_read),
        f"tokens: cls at layer {layer} changes nothing, the language model reads that block {what} without CLS",
    )


def _shown(tokens: object) -> str:
    return f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)


@contextmanager
def hooked_block(site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The block's output x_BTD, in whatever form it comes, becomes change(x_BTD)."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        tokens = output[0] if isinstance(output, tuple) else output
        x_BTD = tokens if site.anatomy.batch_first else tokens.transpose(0, 1)
        changed = change(x_BTD)
        changed = changed if site.anatomy.batch_first else changed.transpose(0, 1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = site.block.register_forward_hook(hook, prepend=True)
    try:
        with _compiled_code_waits:
            yield
    finally:
        handle.remove()


class _ForcedEager:
    """Compiled code, which would not see a hook, runs eagerly while there is one, in whatever order hooks come and go.

    The stance of torch.compile is one for the whole process, so it is set by the first and put back by the last.
    """

    def __init__(self) -> None:
        self._lock, self._number = threading.Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._number == 0:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._number += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._number -= 1
            if self._number == 0:
                self._stance.__exit__(None, None, None)


_compiled_code_waits = _ForcedEager()


# --- how -------------------------------------------------------------------------------------------------------------


class EditPlan(NamedTuple):
    """The edits of R rows as tensors [R, J] on the SAE's device, short rows filled up with edits that are none.

    latents: int64. factor, offset: the SAE's dtype. real: bool, False for filling.
    """

    latents: Tensor
    factor: Tensor
    offset: Tensor
    real: Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[Edit]], sae: SparseAutoencoder) -> "EditPlan":
        """ValueError: a latent that the SAE does not have, or that a row edits twice; a value beyond its dtype."""
        for edits in rows:
            require(isinstance(edits, Sequence), f"edits: {edits!r} is not a sequence of edits")
        n_edits = max((len(edits) for edits in rows), default=0)
        weights = sae.W_dec
        latents = torch.zeros(len(rows), n_edits, dtype=torch.int64)
        factor, offset = torch.ones(len(rows), n_edits), torch.zeros(len(rows), n_edits)
        real = torch.zeros(len(rows), n_edits, dtype=torch.bool)
        for r, edits in enumerate(rows):
            _check_edits(edits, sae.config.d_sae)
            for j, edit in enumerate(edits):
                latents[r, j], real[r, j] = int(edit.latent), True
                factor[r, j], offset[r, j] = float(edit.factor), float(edit.offset)
        held_factor, held_offset = factor.to(weights), offset.to(weights)
        for value, held in ((factor, held_factor), (offset, held_offset)):
            for r, j in (~held.isfinite()).nonzero().tolist():
                dtype = str(weights.dtype).removeprefix("torch.")
                raise ValueError(
                    f"alpha: {float(value[r, j]):g} of latent {int(latents[r, j])} overflows the SAE's {dtype}"
                )
        return cls(latents.to(weights.device), held_factor, held_offset, real.to(weights.device))


def _check_edits(edits: Sequence[Edit], d_sae: int) -> None:
    seen: set[int] = set()
    for edit in edits:
        require(isinstance(edit, Edit), f"edits: {edit!r} is not made by clamp, add, scale or zero")
        require(edit.latent < d_sae, f"latent: {edit.latent} of an SAE whose latents are 0 to {d_sae - 1}")
        require(edit.latent not in seen, f"latent: {edit.latent} is edited twice")
        seen.add(edit.latent)


class Encoded(NamedTuple):
    """N tokens on the SAE's device: x_ND as the model has them; codes and reconstruction in the SAE's dtype."""

    x_ND: Tensor
    codes: CodeRows
    x_hat_ND: Tensor


def encode_tokens(sae: SparseAutoencoder, x_ND: Tensor) -> Encoded:
    """Whatever the model's dtype, device and autocast are: of inference, in the SAE's own precision."""
    with torch.autocast(sae.W_dec.device.type, enabled=False):
        x_ND = x_ND.to(sae.W_dec.device)
        codes = sae.encode(x_ND.to(sae.W_dec.dtype), use_threshold=True)
        return Encoded(x_ND, codes_of_rows(codes), sae.decode(codes))


def edit_tokens(
    sae: SparseAutoencoder, encoded: Encoded, plan: EditPlan, row_N: Tensor, only: bool, error: str
) -> Tensor:
    """The new residual stream [N, D]; token n is edited by row row_N[n] of the plan.

    In the SAE's dtype, or the model's if that is the wider one and error is keep: what is not changed stays as it is.
    """
    latents_NJ, real_NJ = plan.latents[row_N], plan.real[row_N]
    z_NJ = latent_values(encoded.codes, latents_NJ)
    edited_NJ = plan.factor[row_N] * z_NJ + plan.offset[row_N]
    with torch.autocast(sae.W_dec.device.type, enabled=False):
        if only:
            z_hat_ND = _weighted_rows(sae, torch.where(real_NJ, edited_NJ, 0), latents_NJ, sae.b_dec)
            return z_hat_ND if error == "drop" else encoded.x_ND + (z_hat_ND - encoded.x_hat_ND)
        change_NJ = torch.where(real_NJ, edited_NJ - z_NJ, 0)
        base_ND = encoded.x_hat_ND if error == "drop" else encoded.x_ND
        return base_ND + _weighted_rows(sae, change_NJ, latents_NJ, torch.zeros_like(sae.b_dec))


def _weighted_rows(sae: SparseAutoencoder, weights_NJ: Tensor, latents_NJ: Tensor, bias_D: Tensor) -> Tensor:
    """bias + sum_j weight_j W_dec[latent_j], [N, D]."""
    if latents_NJ.shape[1] == 0:
        return bias_D.expand(len(latents_NJ), -1)
    return sparse_decode(weights_NJ, latents_NJ, None, sae.W_dec, bias_D)


def latent_values(codes: CodeRows, latents_NJ: Tensor) -> Tensor:
    """Of every row the activations [N, J] of the latents asked for there; 0 where they do not fire."""
    n_rows = codes.n_rows
    rows_M = entry_rows(codes.latents, codes.row_offsets)
    inside_M = rows_M < n_rows
    rows_M, latents_M, acts_M = rows_M[inside_M], codes.latents[inside_M], codes.acts[inside_M]
    values_NJ = torch.zeros(latents_NJ.shape, dtype=acts_M.dtype, device=acts_M.device)
    for j, latents_N in enumerate(latents_NJ.unbind(1)):  # one at a time: all would be [M, J]
        found_M = torch.where(latents_N[rows_M] == latents_M, acts_M, 0)
        values_NJ[:, j] = torch.zeros_like(values_NJ[:, j]).index_add_(0, rows_M, found_M)
    return values_NJ


def _steered(
    x_BTD: Tensor,
    sae: SparseAutoencoder,
    plan: EditPlan,
    site: Site,
    only: bool,
    tokens: str | Tensor,
    error: str,
    row_of_tile: Tensor | None,
) -> Tensor:
    """x_BTD with the chosen tokens replaced, in its dtype and on its device."""
    n_rows, n_tokens, width = x_BTD.shape
    require(width == sae.config.d_in, f"sae: d_in is {sae.config.d_in}, but the block's output has width {width}")
    if error == "keep" and plan.latents.shape[1] == 0 and not only:
        return x_BTD
    row_B = torch.zeros(n_rows, dtype=torch.int64) if row_of_tile is None else row_of_tile
    require(len(row_B) == n_rows, f"rows: edits for {len(row_B)} rows of the vision tower, but the batch has {n_rows}")
    mask_BT = token_mask(tokens, n_rows, n_tokens, site.anatomy).to(x_BTD.device)
    row_N = row_B.to(x_BTD.device)[:, None].expand(n_rows, n_tokens)[mask_BT].to(plan.latents.device)
    encoded = encode_tokens(sae, x_BTD[mask_BT])
    edited_ND = edit_tokens(sae, encoded, plan, row_N, only, error)
    return x_BTD.masked_scatter(mask_BT[:, :, None], as_the_model_holds(edited_ND, x_BTD, plan, row_N))


def as_the_model_holds(edited_ND: Tensor, x_BTD: Tensor, plan: EditPlan, row_N: Tensor) -> Tensor:
    """In the model's dtype and on its device. ValueError: overflow, of which a model would only fall silent."""
    cast_ND = edited_ND.to(x_BTD.device, x_BTD.dtype)
    if not bool(cast_ND.isfinite().all()) and bool(x_BTD.isfinite().all()):
        row = int(row_N[int((~cast_ND.isfinite()).any(1).nonzero()[0])])
        dtype = str(x_BTD.dtype).removeprefix("torch.")
        raise ValueError(f"alpha: {_largest_edit(plan, row)} overflows {dtype}, which the model computes in")
    return cast_ND


def _largest_edit(plan: EditPlan, row: int) -> str:
    """The edit of a row that is the likeliest to overflow, for a message."""
    if plan.latents.shape[1] == 0:
        return "the SAE's reconstruction (no edit)"
    strength_J = torch.where(plan.real[row], plan.offset[row].abs() + plan.factor[row].abs(), 0)
    j = int(strength_J.argmax())
    value = plan.offset[row, j] if bool(plan.offset[row, j]) else plan.factor[row, j]
    return f"{float(value):g} of latent {int(plan.latents[row, j])}"


def token_mask(tokens: str | Tensor, n_rows: int, n_tokens: int, anatomy: Anatomy) -> Tensor:
    """bool [B, T], True for the chosen tokens. ValueError: a mask of another shape."""
    if isinstance(tokens, Tensor):
        fits = tokens.shape[-1] == n_tokens and (tokens.ndim == 1 or len(tokens) == n_rows)
        require(fits, f"tokens: mask {list(tokens.shape)} for {n_rows} rows of {n_tokens} tokens")
        return tokens.expand(n_rows, n_tokens)
    mask_T = torch.ones(n_tokens, dtype=torch.bool)
    if tokens == "patches":
        mask_T[: anatomy.n_prefix] = False
    elif tokens == "cls":
        mask_T[1:] = False
    return mask_T.expand(n_rows, n_tokens)
