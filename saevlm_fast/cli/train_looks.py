"""What `train` looks at once its SAEs are finished: MS for the summary of a grid, contact sheets for loggers.

From a store: on what is evaluated, by the embeddings that are named. From images, without a store: they pass through
the tower once more, held-out ones where there are any, and by themselves they are embedded as the tower does it.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from saevlm_fast.cli.terminal import tell
from saevlm_fast.config import StreamSettings, TrainConfig
from saevlm_fast.errors import require
from saevlm_fast.urls import redacted_text

if TYPE_CHECKING:
    from saevlm_fast.cli.train_options import TrainArguments
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.images.sources import ImageSource
    from saevlm_fast.look.through_tower import Embedder
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.scoring.monosemanticity import MonosemanticityScores
    from saevlm_fast.towers.tower import HookPoint, Tower
    from saevlm_fast.training.many import Look


def shows_pictures(options: "TrainArguments") -> bool:
    """Whether a logger is asked for that shows images."""
    return any(name != "jsonl" for name in options.log_to)


class StoreLooks:
    """Of SAEs that are trained from a store; called when they are finished.

    Attributes:
        note: what MS is of, or why there is none; for the summary.
    """

    def __init__(self, options: "TrainArguments", evaluated: "Activations", embeddings: "Activations | None"):
        self.options, self.evaluated, self.embeddings = options, evaluated, embeddings
        self.note = "MS is left out: no embeddings were given (--embeddings)"
        self.several_rows = False
        if embeddings is not None:
            self._check(embeddings)

    def _check(self, embeddings: "Activations") -> None:
        from saevlm_fast.scoring.image_rows import image_table

        table = image_table(self.evaluated)
        self.several_rows = table.rows_per_image > 1
        require(
            embeddings.n_rows == table.n_images or (self.evaluated.has_items and embeddings.has_items),
            f"embeddings: {embeddings.n_rows:,} rows of {embeddings.path}, but {table.n_images:,} images are "
            "evaluated; row i of both is image i",
        )

    def __call__(self, saes: "Mapping[str, SparseAutoencoder]") -> "dict[str, Look]":
        from saevlm_fast.look.run_picture import run_picture
        from saevlm_fast.scoring.monosemanticity import score
        from saevlm_fast.training.many import Look

        found = {}
        for name, sae in saes.items():
            metrics = {}
            if self.embeddings is not None:
                scores = score(self.evaluated, self.embeddings, sae, pool="max" if self.several_rows else None)
                metrics = mean_of(scores)
                self.note = f"MS on {scores.n_images:,} images, by {self.embeddings.path}"
            title = f"{self.options.output / name}, step {self.options.steps:,}"
            found[name] = Look(metrics, partial(run_picture, self.evaluated, sae, title))
        return found


class TowerLooks:
    """Of SAEs that are trained while images pass; called when they are finished.

    Attributes:
        note: as of StoreLooks.

    Raises:
        ValueError: embeddings that are not of the images.
    """

    def __init__(self, options: "TrainArguments", tower: "Tower", source: "ImageSource"):
        from saevlm_fast.harvesting.stream import ShuffledImages
        from saevlm_fast.images.open import open_held_out
        from saevlm_fast.training.one_pass import harvest_config

        self.options, self.tower = options, tower
        self.harvest = harvest_config(options.part(StreamSettings), options.part(TrainConfig))
        self.images: ImageSource
        held_out = open_held_out(options.validation_images, str(options.images))
        if held_out is not None:
            self.images, self.path = held_out, str(options.validation_images)
            self.which = "held-out images"
        else:
            n = min(len(source), options.limit or len(source))
            self.images = ShuffledImages(source, n, options.seed, 0).first(options.scored_images)
            self.path = str(options.images)
            self.which = "of the images trained on"
        self.by, self.how = self._embedder(source)
        self.note = self._note(len(self.images))
        if self.by is None:
            self.note = "MS is left out: the tower has neither a projection nor a pooled output (give --embeddings)"
        if not options.scored_images:
            self.note = "MS is left out: --scored-images is 0"

    def _note(self, n_images: int) -> str:
        return f"MS on {n_images:,} {self.which}, by {self.how}"

    def _embedder(self, source: "ImageSource") -> "tuple[HookPoint | Embedder | None, str]":
        """What gives embeddings, and how that is called."""
        import torch

        from saevlm_fast.data.rows import open_activations
        from saevlm_fast.harvesting.stream import ShuffledImages
        from saevlm_fast.look.through_tower import embedder, own_point

        if self.options.embeddings is None:
            point = own_point(self.tower)
            return point, "" if point is None else f"the tower's own {point.name}"
        given, how = open_activations(self.options.embeddings), str(self.options.embeddings)
        if not isinstance(self.images, ShuffledImages):
            return embedder(given, self.images, len(self.images)), how
        rows, numbers_N = embedder(given, source, len(source)), torch.tensor(self.images.numbers)
        return lambda numbers_n: rows(numbers_N[numbers_n]), how

    def __call__(self, saes: "Mapping[str, SparseAutoencoder]") -> "dict[str, Look]":
        from saevlm_fast.look.run_picture import IMAGES_SHOWN, strongest_sheet
        from saevlm_fast.look.store_images import StoreImages
        from saevlm_fast.look.through_tower import look_through_tower
        from saevlm_fast.training.many import Look

        options, shows = self.options, shows_pictures(self.options)
        if not options.scored_images or (self.by is None and not shows):
            return {}
        tell(f"looking at {len(self.images):,} {self.which}")
        stores, whole = self.harvest.store_names, {}
        for name, sae in saes.items():
            whole[name] = stores[0] if len(stores) == 1 else name.partition("/")[0], sae
        seen = look_through_tower(
            self.tower,
            self.images,
            self.path,
            self.harvest,
            whole,
            self.by,
            IMAGES_SHOWN if shows else 0,
            workers=options.workers,
            max_skipped=1.0,  # what is too much has been said while they were trained on, or evaluated
        )
        found = {}
        for name, (scores, tops) in seen.items():
            picture = Look({}).picture
            if tops is not None:
                pictures = StoreImages({"images": {"path": self.path}})
                title = f"{Path(options.output) / name}, step {options.steps:,}"
                picture = partial(strongest_sheet, tops, pictures, title, redacted_text(self.path))
            found[name] = Look({} if scores is None else mean_of(scores), picture)
            self.note = self.note if scores is None else self._note(scores.n_images)
        return found


def mean_of(scores: "MonosemanticityScores") -> dict[str, float]:
    """The mean over the latents that have a score, if any has."""
    summary = scores.summary()
    return {"ms_mean": summary.mean} if summary.counts["defined"] else {}
