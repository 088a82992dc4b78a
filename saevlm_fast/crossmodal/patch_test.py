"""Whether SAE-V's filters keep the patches that a model needs: what it says of a caption when it sees these alone.

A pair goes through its model as it was harvested, but the attention mask hides the image tokens that a filter drops
from the language model; what is left keeps its place. What counts is the caption, each token given those before it:

    log_prob    mean log-probability of its tokens
    right       share of its tokens that the model finds the most probable

Every filter is tried at every kept share, beside `random`, which keeps as many tokens, and `least_active`, which keeps
those that `activation` drops first. The scale's ends are the pair with all its image tokens and with none.

Shape suffixes: P pairs, F filters, Q kept shares, T tokens of a prompt, N image tokens, R rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from saevlm_fast.crossmodal.patches import PATCH_SCORES, Patches, kept_patches
from saevlm_fast.data.rows import Activations
from saevlm_fast.data.store import TOKEN_SCHEMA
from saevlm_fast.errors import first_line, require
from saevlm_fast.images.decode import decode
from saevlm_fast.images.pairs import caption
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.towers.hub import foreign_message, is_foreign
from saevlm_fast.towers.language import MODALITIES, LanguageTower
from saevlm_fast.towers.preprocess import two_pictures

# name -> (score of crossmodal/patches.py, whether its smallest are kept)
FILTERS = {
    "cosine": ("cosine", False),
    "co_occurrence": ("co_occurrence", False),
    "count": ("count", False),
    "activation": ("activation", False),
    "least_active": ("activation", True),
    "random": ("random", False),
}
_TEXT, _IMAGE = MODALITIES.index("text"), MODALITIES.index("image")
_TOKENS_AT_ONCE = 16_384  # of all rows of a forward: their logits are 1 GB at 32,000 words in bfloat16


@dataclass(frozen=True, eq=False)
class PatchTest:
    """What a model says of P captions when it sees some patches alone.

    Attributes:
        ids: of the pairs. shares: of the image tokens that are kept, Q.
        log_prob_FQP, right_FQP: of every filter, in the order of FILTERS.
        log_prob_2P, right_2P: with all image tokens, and with none.
    """

    ids: list[str]
    shares: tuple[float, ...]
    log_prob_FQP: np.ndarray
    right_FQP: np.ndarray
    log_prob_2P: np.ndarray
    right_2P: np.ndarray

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """JSON: of all, none and every filter and share the means over pairs, with 95 % intervals by bootstrap.

        recovered: the share of what the image adds to log_prob that is left, (filter - none) / (all - none) of the
        means; None where it adds nothing. over_random: log_prob more than with as many random tokens of the same
        images.
        """
        draws = np.random.default_rng(seed).integers(0, len(self.ids), (1000, len(self.ids)))
        full, blind = self.log_prob_2P

        def recovered(log_prob_P: np.ndarray, chosen: Any = slice(None)) -> np.ndarray:
            seen = (full[chosen] - blind[chosen]).mean(-1)
            return (log_prob_P[chosen] - blind[chosen]).mean(-1) / np.where(seen == 0, np.nan, seen)

        rows = []
        random_QP = self.log_prob_FQP[list(FILTERS).index("random")]
        for f, name in enumerate(FILTERS):
            for q, share in enumerate(self.shares):
                log_prob_P, right_P = self.log_prob_FQP[f, q], self.right_FQP[f, q]
                over_P = log_prob_P - random_QP[q]
                figures = {
                    "log_prob": (log_prob_P.mean(), log_prob_P[draws].mean(1)),
                    "right": (right_P.mean(), right_P[draws].mean(1)),
                    "recovered": (recovered(log_prob_P), recovered(log_prob_P, draws)),
                    "over_random": (over_P.mean(), over_P[draws].mean(1)),
                }
                rows.append({"filter": name, "share": share} | {key: _figure(*both) for key, both in figures.items()})
        ends = zip(("all", "none"), self.log_prob_2P, self.right_2P)
        told = {name: {"log_prob": float(p.mean()), "right": float(r.mean())} for name, p, r in ends}
        return {"pairs": len(self.ids), **told, "filters": rows}

    def table(self) -> pa.Table:
        """A row a pair, filter and share; filters `all` and `none` are of share 1 and 0."""
        kinds = [(name, share) for name in FILTERS for share in self.shares] + [("all", 1.0), ("none", 0.0)]
        n = len(self.ids)
        columns = {
            name: np.concatenate([filtered.reshape(-1), ends.reshape(-1)])
            for name, filtered, ends in (
                ("log_prob", self.log_prob_FQP, self.log_prob_2P),
                ("right", self.right_FQP, self.right_2P),
            )
        }
        return pa.table(
            {
                "image": self.ids * len(kinds),
                "filter": [name for name, _ in kinds for _ in range(n)],
                "share": [share for _, share in kinds for _ in range(n)],
                **columns,
            }
        )


def _figure(mean: Any, drawn: np.ndarray) -> list[float] | None:
    """[mean, low, high]; None where the image adds nothing, so that there is no share of it."""
    if not np.isfinite(mean) or not np.isfinite(drawn).all():
        return None
    return [float(mean), *(float(each) for each in np.percentile(drawn, [2.5, 97.5]))]


def pairs_to_test(columns: dict[str, np.ndarray], wrong_P: np.ndarray | None, n: int, seed: int) -> np.ndarray:
    """int64, sorted: up to n pairs at random that have a caption, not known to be wrong, and an image.

    ValueError: there are none.
    """
    usable = (columns["n_image"] > 0) & (columns["n_text"] > 0)
    usable &= True if wrong_P is None else ~wrong_P
    of_them = np.flatnonzero(usable)
    require(len(of_them) > 0, "patch_pairs: no pair has an image and a caption that is not known to be wrong")
    return np.sort(np.random.default_rng([seed, 3]).permutation(of_them)[:n])


def first_pairs(activations: Activations, seed: int) -> tuple[list[str], Patches, int]:
    """By which time is estimated: ids of the first pairs, the image tokens of three of them with scores at random, and
    about how many pairs the whole store has. No tokens where none of them has an image and a caption."""
    table = next(iter(activations.iter_items(TOKEN_SCHEMA)))
    names, modality = table["image"].combine_chunks().dictionary_encode(), np.array(table["modality"])
    ids, sample_N = names.dictionary.to_pylist(), np.asarray(names.indices)
    has_text = np.bincount(sample_N[modality == "text"], minlength=len(ids)) > 1
    has_image = np.bincount(sample_N[modality == "image"], minlength=len(ids)) > 0
    has_image[-1:] &= len(table) == activations.n_rows  # else the shard may end within the last pair
    row_M = np.flatnonzero((modality == "image") & np.isin(sample_N, np.flatnonzero(has_text & has_image)[:3]))
    scores = np.random.default_rng(seed).random((len(PATCH_SCORES), len(row_M)))
    patches = Patches(sample_N[row_M], row_M, np.arange(len(row_M)), *scores)
    return ids, patches, round(len(ids) * activations.n_rows / max(len(table), 1))


def patch_test(
    activations: Activations,
    patches: Patches,
    ids: Sequence[str],
    source: ImageSource,
    model: "PartlySeen",
    shares: Sequence[float],
    on_pairs: Callable[[int], None] = lambda done: None,
) -> PatchTest:
    """What the store's model says of captions, with the patches of every filter alone.

    Args:
        activations: the store that the patches are rows of.
        patches: of the pairs that are tested. ids: of all pairs of the store.
        source: the image-text pairs. model: the store's, with its prompt.

    Raises:
        ValueError: pairs that are not those of the store.
    """
    numbers = {source.image_id(i): i for i in range(len(source))}
    samples, sizes = np.unique(patches.sample, return_counts=True)
    kept_FQM = [[kept_patches(patches, share, *how) for share in shares] for how in FILTERS.values()]
    used, found = [], []
    stop = 0
    for done, (sample, size) in enumerate(zip(samples.tolist(), sizes.tolist()), 1):
        start, stop = stop, stop + size
        name = ids[int(sample)]
        require(name in numbers, f"images: {name} of {activations.path} is not there")
        piece = model.tower.preprocess([(decode(source.read(numbers[name])), caption(source, numbers[name]))])
        _check_prompt(activations, patches.row[start:stop], piece, name)
        kept_RN = np.stack([kept_M[start:stop] for kept_QM in kept_FQM for kept_M in kept_QM])
        ends_2N = np.array([[True], [False]]).repeat(size, 1)
        said = model.said(piece, torch.from_numpy(np.concatenate([kept_RN, ends_2N])))
        if said is not None:
            used.append(name)
            found.append(said)
        on_pairs(done)
    require(len(used) > 0, "patch_pairs: none has a token of its caption that can be foretold")
    log_prob_RP, right_RP = np.stack(found, axis=-1)
    shape = (len(FILTERS), len(shares), len(used))
    return PatchTest(
        used,
        tuple(shares),
        log_prob_RP[:-2].reshape(shape),
        right_RP[:-2].reshape(shape),
        log_prob_RP[-2:],
        right_RP[-2:],
    )


def _check_prompt(activations: Activations, row_N: np.ndarray, piece: dict[str, Tensor], name: str) -> None:
    """ValueError: the tokens of the pair are not those that the store has, where row_N are those of the image."""
    places_N = (piece["modality"][0] == _IMAGE).nonzero().flatten()
    ids_T = piece["input_ids"][0]
    first = int(row_N[0]) - int(places_N[0]) if len(places_N) else 0
    rows_T = torch.arange(first, first + len(ids_T))
    same = len(places_N) == len(row_N) and first >= 0 and first + len(ids_T) <= activations.n_rows
    if same:
        items = activations.items(rows_T, TOKEN_SCHEMA)
        same = items["token_id"].to_pylist() == ids_T.tolist() and set(items["image"].to_pylist()) == {name}
        same = same and (places_N + first).tolist() == row_N.tolist()
    require(same, f"images: {name} or its caption is not as in {activations.path}: the prompt has other tokens")


class PartlySeen:
    """A language tower that sees some of an image's tokens alone.

    The language model is given its mask where it is called, behind what finds the places of tokens by the whole mask
    (Qwen-VL); a model that makes its own mask of that first (Gemma 3) has it from the start.
    """

    def __init__(self, tower: LanguageTower):
        """Checks that the model takes a mask as it is needed here.

        Raises:
            ValueError: hidden tokens change the places of others; with all image tokens hidden another picture still
                changes what the model says, or with none hidden it does not.
        """
        self.tower, blocks = tower, tower.anatomy.blocks
        holders = (m for m in tower.model.modules() if any(_holds(child, blocks) for child in m.children()))
        self._reader, self._behind = next(holders), True
        picture, other = two_pictures()
        pieces = [tower.preprocess([(each, "two things")]) for each in (picture, other.resize(picture.size))]
        what = f"model: {tower.spec}: {type(tower.model).__name__} cannot be shown some patches alone"
        n = int((pieces[0]["modality"] == _IMAGE).sum())
        given: list[list[Tensor]] = []
        catch = blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: given.append(_tensors([args, {**kwargs, "attention_mask": None}])),
            with_kwargs=True,
        )
        text_T = (pieces[0]["modality"][0] == _TEXT).to(tower.device)
        try:
            seen, *blind = [
                next(self._logits(piece, torch.full((1, n), kept)))[0, text_T]
                for piece, kept in ((pieces[0], True), (pieces[0], False), (pieces[1], False))
            ]
        except Exception as error:
            if not is_foreign(error):
                raise
            said = first_line(error) if isinstance(error, ValueError | AssertionError) else foreign_message(error)
            raise ValueError(f"{what}: {said}") from error
        finally:
            catch.remove()
        whole, *hidden = given[-3:]  # before them there may be one that found how the mask is given
        same = len(whole) == len(hidden[0]) and all(map(torch.equal, whole, hidden[0]))
        require(same, f"{what}: hidden tokens change the places of others")
        relative = 1e-3 if tower.dtype == torch.float32 else 3e-2
        differ, size = float((blind[0] - blind[1]).float().norm()), float(blind[0].float().norm())
        require(differ <= relative * size, f"{what}: its pixels come in by other ways too")
        require(not torch.equal(seen, blind[0]), f"{what}: what it says does not depend on the image")

    def said(self, piece: dict[str, Tensor], kept_RN: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
        """float64 [R], [R]: log_prob and right of the pair's caption with the kept image tokens of every row alone.

        A token of the caption right behind the image is left out: what foretells it may be hidden. None: there is no
        other. ValueError: the model gives no logits of every token.
        """
        modality_T, ids_T = piece["modality"][0], piece["input_ids"][0]
        text = (modality_T == _TEXT).nonzero().flatten()
        text = text[(text > 0) & (modality_T[text - 1] != _IMAGE)]
        if len(text) == 0:
            return None
        log_prob, right = [], []
        for logits_BTV in self._logits(piece, kept_RN):
            log_p_BTV = logits_BTV[:, text - 1].double().log_softmax(-1).cpu()
            log_prob.append(log_p_BTV[:, torch.arange(len(text)), ids_T[text]].mean(1))
            right.append((log_p_BTV.argmax(-1) == ids_T[text]).double().mean(1))
        return torch.cat(log_prob).numpy(), torch.cat(right).numpy()

    def _logits(self, piece: dict[str, Tensor], kept_RN: Tensor) -> Iterator[Tensor]:
        """[B, T, V] of some rows after the other."""
        tower, n_tokens = self.tower, piece["input_ids"].shape[1]
        places_N = (piece["modality"][0] == _IMAGE).nonzero().flatten()
        for kept_BN in kept_RN.split(max(1, _TOKENS_AT_ONCE // n_tokens)):
            joined = tower.preprocess.join([piece] * len(kept_BN)) or {}
            inputs = {name: x.to(tower.device) for name, x in joined.items()}
            mask_BT = inputs["attention_mask"].clone()
            mask_BT[:, places_N] = kept_BN.to(mask_BT)
            with torch.inference_mode():
                if self._behind:
                    with self._masked(mask_BT) as masked:
                        made = tower.forward(inputs)
                    self._behind = len(masked) > 0
                if not self._behind:
                    made = tower.forward({**inputs, "attention_mask": mask_BT})
            logits = getattr(made, "logits", None)
            fits = isinstance(logits, Tensor) and list(logits.shape[:2]) == [len(kept_BN), n_tokens]
            require(fits, f"model: {tower.spec}: {type(tower.model).__name__} gives no logits of every token")
            assert isinstance(logits, Tensor)
            yield logits

    @contextmanager
    def _masked(self, mask_BT: Tensor) -> Iterator[list[None]]:
        """The language model is called with this mask instead of the whole one; yields what tells that it was."""
        masked: list[None] = []

        def swap(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            given = kwargs.get("attention_mask")
            if not isinstance(given, Tensor) or given.shape != mask_BT.shape:
                return None
            masked.append(None)
            return args, {**kwargs, "attention_mask": mask_BT}

        handle = self._reader.register_forward_pre_hook(swap, with_kwargs=True)
        try:
            yield masked
        finally:
            handle.remove()


def _holds(module: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == len(blocks) and module[0] is blocks[0]


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for each in inside for tensor in _tensors(each)]
