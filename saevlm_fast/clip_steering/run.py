"""All units of a kind, block by block: what is asked, what is finished, the table and its summary.

Finished blocks lie in OUTPUT.progress, known again by what went into them; an interrupted run goes on from there.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from saevlm_fast.clip_steering.screening import screened
from saevlm_fast.clip_steering.steerability import (
    CHANCE,
    ENOUGH,
    Changes,
    Reference,
    ReferenceSums,
    Steering,
    chances,
    nearest_in_density,
)
from saevlm_fast.clip_steering.stream import ImageBatch, Stream, Vocabulary
from saevlm_fast.clip_steering.units import Units
from saevlm_fast.config import SteerabilityConfig
from saevlm_fast.errors import Interrupted, require
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.measures.parts import Parts, key_of
from saevlm_fast.measures.results import Figures, Measured, share

_BLOCK = 64  # units that are kept together
_COLUMNS = (
    "s",
    "chance",
    "s_random",
    "s_reversed",
    "s_density",
    "s_shuffled",
    "s_without_error",
    "specificity",
    "consistency",
    "length",
    "concept_change",
)
MEANS = tuple(name for name in _COLUMNS if name not in ("chance", "length", "concept_change"))  # over units


def spread(n: int, most: int) -> list[int]:
    """Numbers of at most `most` of n images, evenly spaced."""
    return [i * n // min(n, most) for i in range(min(n, most))]


@dataclass(frozen=True)
class Steerable:
    """What was found of one kind of units.

    Attributes:
        kind: latent or neuron. table: one row a unit. summary: figures; `steerable` is a share with its interval.
    """

    kind: str
    table: pa.Table
    summary: Figures


class Asking:
    """Images, words, and the units that are asked about on them.

    Raises:
        ValueError: no usable image.
    """

    def __init__(
        self, stream: Stream, source: ImageSource, vocabulary: Vocabulary, config: SteerabilityConfig, made_of: Any
    ) -> None:
        self.stream, self.vocabulary, self.config = stream, vocabulary, config
        self.source, self.made_of = source, made_of
        self.asked: list[ImageBatch] = list(stream.batches(source, spread(len(source), config.ask)))
        self.n_images = sum(len(batch) for batch in self.asked)
        require(self.n_images > 0, f"images: none of {len(spread(len(source), config.ask))} is usable")

    def references(self, kinds: Sequence[Units]) -> list[Reference]:
        """One pass over the reference images for all kinds of units."""
        chosen = spread(len(self.source), self.config.n_reference)
        sums = [ReferenceSums(units, len(chosen)) for units in kinds]
        for batch in self.stream.batches(self.source, chosen):
            mask_BT = self.stream.mask(batch.x_BTD)[:, :, 0]
            for each in sums:
                each.add(batch.x_BTD, mask_BT)
        return [each.result() for each in sums]

    def measure(
        self,
        units: Units,
        known: Reference,
        chosen_J: Tensor,
        parts: Parts,
        on_units: Callable[[int], None] = lambda done: None,
        interrupted: threading.Event | None = None,
        subject: str | None = None,
    ) -> Steerable:
        """Of the chosen units. Interrupted: after a block, which is kept.

        subject: by which the parts of one SAE are told from those of another; None is the kind of the units.
        """
        config, subject = self.config, subject or units.kind
        target_S = config.alpha * known.q99_S.nan_to_num(0.0)
        alive_J = chosen_J[known.density_S[chosen_J] > 0]
        linear_S = None
        if config.screen is not None and config.screen < len(alive_J):
            linear_S = screened(self.stream, self.asked, units, target_S, self.vocabulary, seed=config.seed)
            alive_J = alive_J[linear_S[alive_J].argsort(descending=True, stable=True)[: config.screen]].sort().values
        steering = Steering(self.stream, self.asked, units, self.vocabulary, config.controls, config.seed)
        found: list[dict[str, np.ndarray]] = []
        for start in range(0, len(alive_J), _BLOCK):
            block_J = alive_J[start : start + _BLOCK]
            targets = target_S[block_J].tolist()
            key = key_of(of=units.made_of, units=block_J.tolist(), targets=targets, **self.made_of)
            name = f"block_{start:06d}"
            done = parts.read(subject, name, key)
            if done is None:
                done = Measured({}, steering.changes(block_J, target_S[block_J]).columns())
                parts.write(subject, name, key, done)
            found.append(done.latents)
            on_units(start + len(block_J))
            if interrupted is not None and interrupted.is_set():
                raise Interrupted(f"interrupted after {start + len(block_J)} of {len(alive_J)} {units.kind}s")
        return self._steerable(units, known, chosen_J, alive_J, found, linear_S)

    def _steerable(
        self,
        units: Units,
        known: Reference,
        chosen_J: Tensor,
        asked_J: Tensor,
        found: list[dict[str, np.ndarray]],
        linear_S: Tensor | None,
    ) -> Steerable:
        n_random = len(asked_J) * self.config.controls
        columns: dict[str, np.ndarray] = {}
        if found:
            changes = Changes.join(found)
            columns = {name: value for name, value in vars(changes).items() if name != "s_random_JQ"}
            columns["s_random"] = changes.s_random_JQ.mean(1)
            chance_J = chances(changes.s, changes.length, changes.s_random_JQ)
            columns["chance"] = np.where(np.isfinite(changes.s), chance_J, np.nan)
            nearest_J = nearest_in_density(known.density_S[asked_J].numpy())
            columns["s_density"] = np.where(nearest_J >= 0, changes.s[nearest_J], np.nan)
        table = self._table(units, known, chosen_J, asked_J, columns, linear_S)
        enough = n_random >= ENOUGH
        steerable = share(columns["chance"] <= CHANCE) if found and enough else share(np.zeros(0, bool))
        figures: Figures = {
            "units": len(chosen_J),
            "asked": len(asked_J),
            "dead": int((known.density_S[chosen_J] == 0).sum()),
            "random_directions": n_random,
            "steerable": steerable,
        }
        for name in MEANS:
            values = columns.get(name, np.zeros(0))
            figures[name] = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
        return Steerable(units.kind, table, figures)

    def _table(
        self,
        units: Units,
        known: Reference,
        chosen_J: Tensor,
        asked_J: Tensor,
        columns: dict[str, np.ndarray],
        linear_S: Tensor | None,
    ) -> pa.Table:
        place = {unit: row for row, unit in enumerate(chosen_J.tolist())}
        rows = np.array([place[unit] for unit in asked_J.tolist()], np.int64)
        dead_J = (known.density_S[chosen_J] == 0).numpy()
        status = np.where(dead_J, "dead", "not asked").astype(object)
        sound = np.isfinite(columns.get("s", np.zeros(0)))
        status[rows] = np.where(sound, "defined", "no number")
        made: dict[str, pa.Array] = {
            units.kind: pa.array(chosen_J.numpy()),
            "status": pa.array(status.tolist(), pa.string()),
            "density": pa.array(known.density_S[chosen_J].numpy()),
            "q99": pa.array(known.q99_S[chosen_J].double().numpy()),
        }
        if linear_S is not None:
            made["s_linear"] = pa.array(linear_S[chosen_J].numpy())
        for name in _COLUMNS:
            values = np.full(len(chosen_J), np.nan)
            values[rows] = columns.get(name, np.zeros(0))
            made[name] = pa.array(values)
        words = np.full(len(chosen_J), None, object)
        named = zip(columns.get("concept", np.zeros(0, np.int64)), sound)
        words[rows] = [self.vocabulary.words[c] if there else None for c, there in named]
        return pa.table(made | {"concept": pa.array(words.tolist(), pa.string())})


def progress_of(output: Path) -> Path:
    """Where finished blocks lie until the table is written."""
    return output.with_name(f"{output.name}.progress")
