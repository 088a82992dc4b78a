"""The paper's way on what is in the box: scenes, SAEs, scores, and a picture of what the latents see.

Each step is one function; the command `demo` calls them in this order and shows their progress.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saevlm_fast.config import Architecture, RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.demo.ground_truth import CONCEPTS, latent_concepts, scene_words
from saevlm_fast.demo.scene_stores import LAYER, N_SCENES, RECIPE, TOWER, SceneStores
from saevlm_fast.images.decode import decode
from saevlm_fast.images.scenes import PREFIX, open_scenes, scene_labels
from saevlm_fast.look.contact_sheet import LatentRow, Section, draw_sheet
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores, StreamedScore, streamed_score
from saevlm_fast.scoring.naming import latent_directions, nearest_words
from saevlm_fast.scoring.ranks import spearman
from saevlm_fast.scoring.top_images import top_images
from saevlm_fast.towers.text import load_text_encoder
from saevlm_fast.training.evaluate import Metrics
from saevlm_fast.training.run import train

if TYPE_CHECKING:
    from PIL.Image import Image

RAW = "raw neurons"
ARCHITECTURES: tuple[Architecture, ...] = ("batch_topk", "matryoshka")
_TITLES = {RAW: "Raw neurons", "batch_topk": "BatchTopK SAE", "matryoshka": "Matryoshka SAE"}
_SHOWN = {RAW: 2, "batch_topk": 7, "matryoshka": 4}  # rows of the picture
_IMAGES, _NAMES = 10, 2  # of a row
_ENOUGH = 50  # images on which a latent must fire to be shown


@dataclass(frozen=True)
class Measured:
    """One line of the demo's table; of raw neurons explained_variance and l0 have no meaning and are None.

    Attributes:
        latents: how many there are. defined: of how many the score is defined on the test scenes.
        seen: how many of these fire on at least 50 scenes. A latent that fires on few has alike images and a pure value
            by luck, the more so the fewer, so what follows is of these:
        ms_mean, ms_std, ms_best: Monosemanticity Score.
        purity: mean share of a latent's activation on its best factor value, above that value's base rate.
        correlation: Spearman's, of MS and purity.
    """

    name: str
    latents: int
    defined: int
    seen: int
    explained_variance: float | None
    l0: float | None
    ms_mean: float
    ms_std: float
    ms_best: float
    purity: float
    correlation: float

    def to_dict(self) -> dict[str, object]:
        """JSON: NaN as None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def train_on_scenes(
    architecture: Architecture,
    train_on: SceneStores,
    test_on: SceneStores,
    steps: int,
    options: RunOptions,
    on_log: Callable[[int, Metrics], None],
    on_step: Callable[[int], None],
) -> tuple[SparseAutoencoder, Metrics]:
    """An SAE of the demo, and its evaluation on scenes it was not trained on."""
    data, held_out = open_activations(train_on.activations), open_activations(test_on.activations)
    sae_config = SAEConfig.sized(data.d, expansion=RECIPE["expansion"], k=RECIPE["k"], architecture=architecture)
    config = TrainConfig(steps=steps, batch_size=RECIPE["batch_size"], dead_after=RECIPE["dead_after"])
    return train(data, sae_config, config, options, validation=held_out, on_log=on_log, on_step=on_step)


class Scored:
    """Latents of an SAE, or raw neurons without one, on the test scenes.

    Attributes: name; scores; sums, from which names come; purity_S and value_S as in ground_truth.LatentConcepts.
    """

    def __init__(self, name: str, test_on: SceneStores, sae: SparseAutoencoder | None, on_rows: Callable[[int], None]):
        self.name, self.sae = name, sae
        device = "cpu" if sae is None else sae.b_dec.device
        self.activations: Activations = open_activations(test_on.activations)
        embeddings = open_activations(test_on.embeddings)
        self.sums: StreamedScore = streamed_score(self.activations, embeddings, sae, device=device, on_rows=on_rows)
        self.scores: MonosemanticityScores = self.sums.result()
        labels = scene_labels(self.activations.items()["image"].to_pylist())
        truth = latent_concepts(self.activations, *labels, sae, device=device)
        self.purity_S, self.value_S = truth.purity_S, truth.value_S

    def measured(self, metrics: Metrics | None) -> Measured:
        """metrics: of `train`, None for raw neurons."""
        seen_S = self._seen()
        ms_L, purity_L = self.scores.ms[seen_S], self.purity_S[seen_S]
        return Measured(
            name=self.name,
            latents=len(self.scores.ms),
            defined=int(self.scores.ms.isfinite().sum()),
            seen=len(ms_L),
            explained_variance=None if metrics is None else metrics["explained_variance"],
            l0=None if metrics is None else metrics["l0"],
            ms_mean=float(ms_L.mean()),
            ms_std=float(ms_L.std(correction=0)),
            ms_best=float(ms_L.max()) if len(ms_L) else math.nan,
            purity=float(purity_L.mean()),
            correlation=spearman(ms_L, purity_L) if len(ms_L) >= 2 else math.nan,
        )

    def _seen(self) -> Tensor:
        return self.scores.ms.isfinite() & (self.scores.n_active >= _ENOUGH)

    def section(self) -> Section:
        """The best latents that have a name which no better one has, each with its top images."""
        words = scene_words()
        texts_ME = load_text_encoder(f"hf:{TOWER}").embed(words.texts)
        seen_S = self._seen()
        order = self.scores.ms.masked_fill(~seen_S, -torch.inf).argsort(descending=True, stable=True)
        order = order[: int(seen_S.sum())]
        names = nearest_words(latent_directions(self.sums)[order], texts_ME, words.words, _NAMES)
        chosen: dict[str, int] = {}
        for i, found in enumerate(names):
            chosen.setdefault(found[0].word if found else "", i)
        ranks = sorted(chosen.values())[: _SHOWN[self.name]]
        rows = self._rows(order[ranks].tolist(), [[name.word for name in names[i]] for i in ranks])
        unit = "neuron" if self.sae is None else "latent"
        return Section(
            f"{_TITLES[self.name]}: the best {len(rows)} by Monosemanticity Score, one of each name", rows, unit
        )

    def _rows(self, latents: list[int], names: list[list[str]]) -> list[LatentRow]:
        source = open_scenes(f"{PREFIX}test:{self.activations.n_rows}")
        tops = top_images(self.activations, latents, _IMAGES, self.sae) if latents else []
        return [
            LatentRow(
                latent=latent,
                score=float(self.scores.ms[latent]),
                n_active=int(self.scores.n_active[latent]),
                names=words,
                images=[decode(source.read(i)) for i in top.images.tolist()],
                activations=top.acts.tolist(),
                note=f"labels: {CONCEPTS[int(self.value_S[latent])].name}, purity {float(self.purity_S[latent]):.2f}",
            )
            for latent, words, top in zip(latents, names, tops)
        ]


def picture(scored: list[Scored], steering: Section) -> "Image":
    """The contact sheet: raw neurons, then each SAE's latents, best first, and what steering did."""
    caption = (
        f"{TOWER}, residual stream after block {LAYER}, CLS token; {N_SCENES['test']:,} scenes that the SAEs were not "
        f"trained on; latents that fire on {_ENOUGH} of them or more. Large words: nearest by the text tower. Labels: "
        "the truth, and the share of the latent's activation on it, above its base rate."
    )
    return draw_sheet("What single latents see", caption, [*(each.section() for each in scored), steering], _IMAGES)
