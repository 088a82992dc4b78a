"""Steering: a vision tower's residual stream changed through an SAE's latents, by forward hooks on an untouched model.

    with steer(llava, sae, layer=22, edits=[clamp(1234, 100.0)]):
        tokens = llava.generate(**inputs)

At the chosen tokens the output x of block `layer` becomes, with z = encode(x) and z' = z after the edits,

    error="drop"    decode(z')                      the paper: what the SAE cannot reconstruct is lost
    error="keep"    x + decode(z') - decode(z)      the change alone

computed as decode(z) + sum_j (z'_j - z_j) W_dec[j], and as x + the same sum (times the token's own scale where the SAE
normalises its input, whose latents have no units): a latent is only looked up, however many
there are, and no edits at error="keep" leave x as it is to the last bit. Latents are in raw activation units, encoded
as at inference (threshold or row-wise top k), in the SAE's dtype and on its device; the result returns to the model's.

Where it acts, and how it comes and goes, is in steering/site.py.

Shape suffixes: B rows of the block (images, or their tiles), T tokens, D width, N tokens of all rows, J edits.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saevlm_fast.errors import real_number, require, shown, whole_number
from saevlm_fast.kernels.sparse_decode import sparse_decode
from saevlm_fast.runtime import exactly, tf32_products, without_autocast
from saevlm_fast.sae import InputStatistics, SparseAutoencoder
from saevlm_fast.settings import several
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.steering.site import Site, find_site, hooked_block, token_mask

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
        object.__setattr__(self, "latent", whole_number("latent", self.latent, 0))
        for name in ("factor", "offset"):
            value = real_number(name, getattr(self, name))
            object.__setattr__(self, name, value)
            fits = math.isfinite(value) and abs(value) <= _LARGEST
            require(fits, f"alpha: {value} of latent {self.latent} is not finite in float32")


def clamp(latent: int, alpha: float) -> Edit:
    """The latent is alpha, whether it fires or not; in raw activation units."""
    return Edit(latent, 0.0, real_number("alpha", alpha))


def add(latent: int, alpha: float) -> Edit:
    """alpha more, wherever the latent fires or not; in raw activation units."""
    return Edit(latent, 1.0, real_number("alpha", alpha))


def scale(latent: int, factor: float) -> Edit:
    """factor times as much, where the latent fires."""
    return Edit(latent, real_number("factor", factor), 0.0)


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
    part: str = "vision",
) -> Iterator[None]:
    """Inside `with`, the model's vision tower is steered after block `layer` (from 0), the same way in every row.

    In all threads that run this model; compiled code of the whole process runs eagerly meanwhile.

    Args:
        model: a model of transformers with a vision tower, whole (LLaVA, Qwen-VL, CLIP and their like) or the vision
            part alone; open_clip's or timm's model. Its dtype and device are its own.
        sae: of the residual stream after that block.
        edits: no latent twice. None at all is the identity control: the SAE is attached, nothing is changed.
        only: every latent without an edit becomes 0 (scale(k, 1.0) leaves k alone as it is).
        tokens: all, patches, cls, or a bool mask [T] or [B, T] over the tower's token sequence, CLS first.
        error: drop or keep, see the module's docstring.
        part: vision; or language, whose blocks are then meant: all tokens, those of answers too, filled-up ones too.

    Raises:
        ValueError: in one line: no such layer, one that the language model does not read (or whose CLS token it does
            not), a width that is not the SAE's, a latent that is not there or is edited twice, an unknown choice; at
            the forward, a mask that does not fit the tokens.
    """
    site = find_site(model, sae, layer, tokens, error, part)
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
    rows = several("rows", rows)
    tiles = None if tiles is None else [whole_number("tiles", n) for n in several("tiles", tiles)]
    n_tiles = torch.tensor([1] * len(rows) if tiles is None else tiles, dtype=torch.int64, device="cpu")
    require(len(n_tiles) == len(rows), f"tiles: {len(n_tiles)} numbers for {len(rows)} rows")
    plan = EditPlan.of_rows(rows, sae)
    row_of_tile = torch.arange(len(rows), device="cpu").repeat_interleave(n_tiles)
    with hooked_block(site, lambda x_BTD: _steered(x_BTD, sae, plan, site, only, tokens, error, row_of_tile)):
        yield


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
            require(isinstance(edits, Sequence), f"edits: {shown(edits)} is not a sequence of edits")
        n_edits = max((len(edits) for edits in rows), default=0)
        weights = sae.W_dec
        latents = torch.zeros(len(rows), n_edits, dtype=torch.int64, device="cpu")
        offset, real = torch.zeros_like(latents, dtype=torch.float32), torch.zeros_like(latents, dtype=torch.bool)
        factor = torch.ones_like(offset)
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
        require(isinstance(edit, Edit), f"edits: {shown(edit)} is not made by clamp, add, scale or zero")
        require(edit.latent < d_sae, f"latent: {edit.latent} of an SAE whose latents are 0 to {d_sae - 1}")
        require(edit.latent not in seen, f"latent: {edit.latent} is edited twice")
        seen.add(edit.latent)


class Encoded(NamedTuple):
    """N tokens on the SAE's device: x_ND as the model has them; codes and reconstruction in the SAE's dtype.

    statistics: of an SAE that normalises its input, by which a change of the codes becomes one of x.
    """

    x_ND: Tensor
    codes: SparseCodes
    x_hat_ND: Tensor
    statistics: InputStatistics | None = None

    @classmethod
    def join(cls, pieces: Sequence["Encoded"], d_sae: int) -> "Encoded":
        """The tokens of all pieces, at least one, in order."""
        statistics = [piece.statistics for piece in pieces if piece.statistics is not None]
        return cls(
            torch.cat([piece.x_ND for piece in pieces]),
            SparseCodes.join([piece.codes for piece in pieces], d_sae),
            torch.cat([piece.x_hat_ND for piece in pieces]),
            InputStatistics(*(torch.cat(tensors) for tensors in zip(*statistics))) if statistics else None,
        )


@tf32_products(False)
def encode_tokens(sae: SparseAutoencoder, x_ND: Tensor) -> Encoded:
    """Whatever the model's dtype, device and autocast are: of inference, in the SAE's own precision."""
    with without_autocast():
        x_ND = x_ND.to(sae.W_dec.device)
        held_ND = x_ND.to(sae.W_dec.dtype)
        codes, statistics = sae.encode(held_ND, use_threshold=True), sae.input_statistics(held_ND)
        return Encoded(x_ND, codes, sae.decode(codes, statistics), statistics)


def edit_tokens(
    sae: SparseAutoencoder, encoded: Encoded, plan: EditPlan, row_N: Tensor, only: bool, error: str
) -> Tensor:
    """The new residual stream [N, D]; token n is edited by row row_N[n] of the plan.

    In the SAE's dtype, or the model's if that is the wider one and error is keep: what is not changed stays as it is.
    """
    latents_NJ, real_NJ = plan.latents[row_N], plan.real[row_N]
    z_NJ = latent_values(encoded.codes, latents_NJ)
    edited_NJ = plan.factor[row_N] * z_NJ + plan.offset[row_N]
    with without_autocast():
        if only:
            z_hat_ND = _weighted_rows(sae, torch.where(real_NJ, edited_NJ, 0), latents_NJ, sae.b_dec)
            if encoded.statistics is not None:
                z_hat_ND = z_hat_ND * encoded.statistics.scale + encoded.statistics.mean
            return z_hat_ND if error == "drop" else encoded.x_ND + (z_hat_ND - encoded.x_hat_ND)
        change_NJ = torch.where(real_NJ, edited_NJ - z_NJ, 0)
        base_ND = encoded.x_hat_ND if error == "drop" else encoded.x_ND
        shift_ND = _weighted_rows(sae, change_NJ, latents_NJ, torch.zeros_like(sae.b_dec))
        return base_ND + (shift_ND if encoded.statistics is None else shift_ND * encoded.statistics.scale)


def _weighted_rows(sae: SparseAutoencoder, weights_NJ: Tensor, latents_NJ: Tensor, bias_D: Tensor) -> Tensor:
    """bias + sum_j weight_j W_dec[latent_j], [N, D]."""
    if latents_NJ.shape[1] == 0:
        return bias_D.expand(len(latents_NJ), -1)
    return sparse_decode(weights_NJ, latents_NJ, None, sae.W_dec, bias_D)


def latent_values(codes: SparseCodes, latents_NJ: Tensor) -> Tensor:
    """Of every row the activations [N, J] of the latents asked for there; 0 where they do not fire."""
    acts_M, latents_M, _ = codes.csr()
    rows_M = codes.entry_rows()
    inside_M = rows_M < codes.n_rows
    rows_M, latents_M, acts_M = rows_M[inside_M], latents_M[inside_M], acts_M[inside_M]
    values_NJ = torch.zeros(latents_NJ.shape, dtype=acts_M.dtype, device=acts_M.device)
    for j, latents_N in enumerate(latents_NJ.unbind(1)):  # one at a time: all would be [M, J]
        found_M = torch.where(latents_N[rows_M] == latents_M, acts_M, 0)
        values_NJ[:, j] = torch.zeros_like(values_NJ[:, j]).index_add_(0, rows_M, found_M)
    return values_NJ


@exactly
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
