"""Colours of tiny-llava's answers, steered by latents of its vision tower: what the demo shows of steering.

Labels say which latents stand for a colour (ground_truth.shared_value), before anything is steered. All of them are
tried, on scenes of one object that is not of their colour; none is left out of the table.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.box.scenes import COLOURS, OBJECT_FACTORS, SCENE_FACTORS, Scenes
from saevlm_fast.data.codes import mean_pool_codes
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.demo.ground_truth import latent_concepts, shared_value
from saevlm_fast.demo.scene_stores import LAYER, N_SCENES, SceneStores
from saevlm_fast.images.scenes import scene_labels
from saevlm_fast.look.contact_sheet import Captioned, Section
from saevlm_fast.sae import SparseAutoencoder, inferred
from saevlm_fast.scoring.top_images import top_images
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.steering.edits import Edit, clamp
from saevlm_fast.towers.text import load_llava

if TYPE_CHECKING:
    from PIL.Image import Image

LLAVA, QUESTION = "tiny-llava", "What colour is the object?"
N_PATCH_SCENES = {"train": 4_000, "test": 1_000}  # harvested for the SAE of patches: of CLS, LLaVA reads nothing
PATCHES = {"train": "random:8", "test": "patches"}  # patches of each
STRENGTH = 2.0  # times the largest activation that was seen
N_TOP, _N_ASKED, _IMAGES = 16, 40, 10


@dataclass(frozen=True)
class ColourLatent:
    """A latent that stands for a colour, and what steering with it did, as shares of the scenes asked about.

    Attributes:
        purity: as in ground_truth.LatentConcepts, over images, mean of their patches.
        alpha: what it is clamped to. n: scenes without its colour.
        before, attached, random, clamped: answers that are its colour: of the model as it is, with the SAE's
            reconstruction alone, with another latent that fires clamped to the same, with this one clamped.
    """

    latent: int
    colour: str
    purity: float
    alpha: float
    n: int
    before: float
    attached: float
    random: float
    clamped: float


@dataclass(frozen=True)
class SteeringExample:
    """All colour latents, the strongest first, and for that one the scenes with the answers before and after."""

    latents: list[ColourLatent]
    images: list["Image"]
    answers: list[tuple[str, str]]

    def section(self) -> Section:
        """A row of the picture."""
        title = f"Steering {LLAVA}: {QUESTION}"
        if not self.latents:
            return Section(title, [])
        best = self.latents[0]
        notes = [f"latent {best.latent} of the patches", f"clamped to {best.alpha:.1f}", "answers: before, after"]
        return Section(title, [Captioned(best.colour, notes, self.images[:_IMAGES], self.answers[:_IMAGES])])


def steer_colours(
    sae: SparseAutoencoder, test_on: SceneStores, on_latents: Callable[[int, int], None] = lambda done, total: None
) -> SteeringExample:
    """Clamps every latent that stands for a colour, and asks for the colour of objects that have another one.

    Args:
        sae: of single patches after block LAYER. test_on: all patches of scenes that it was not trained on.
        on_latents: called with the number of latents done, and of all.
    """
    pooled_NS, largest_S, scenes = _pooled(sae, open_activations(test_on.activations))
    found = _colour_latents(pooled_NS, *scene_labels(scenes))
    found.sort(key=lambda each: -float(largest_S[each[0]]))
    alive = (pooled_NS > 0).any(0).nonzero().squeeze(1)
    asked = _Asked(sae)
    tried: list[ColourLatent] = []
    for latent, colour, purity in found:
        others = alive[alive != latent]
        random = int(others[np.random.default_rng(latent).integers(len(others))])
        tried.append(asked.clamped(latent, colour, purity, STRENGTH * float(largest_S[latent]), random))
        on_latents(len(tried), len(found))
    return SteeringExample(tried, *(asked.example(tried[0]) if tried else ([], [])))


def _pooled(sae: SparseAutoencoder, patches: Activations) -> tuple[Tensor, Tensor, list[str]]:
    """Mean activation [N, S] over every scene's patches, the largest [S] of any patch, the ids of the scenes."""
    ids, image_of_row = np.unique(patches.items()["image"].to_numpy(), return_inverse=True)
    with closing(patches.chunks(8192)) as chunks:
        codes = SparseCodes.join([inferred(sae, x_BD) for _, x_BD in chunks], sae.config.d_sae).to("cpu")
    pooled_NS = mean_pool_codes(codes, torch.from_numpy(image_of_row), len(ids)).dense()
    largest_S = torch.zeros(sae.config.d_sae).scatter_reduce(0, codes.top_indices, codes.top_acts, "amax")
    return pooled_NS, largest_S, ids.tolist()


def _colour_latents(pooled_NS: Tensor, objects_NOF: np.ndarray, setting_NF: np.ndarray) -> list[tuple[int, str, float]]:
    """(latent, colour, purity) of those whose top images all show that colour."""
    pooled = Activations.from_tensor(pooled_NS)
    seen = ((pooled_NS > 0).sum(0) >= N_TOP).nonzero().squeeze(1)
    values = shared_value(top_images(pooled, seen, N_TOP), objects_NOF, setting_NF)
    purity_S = latent_concepts(pooled, objects_NOF, setting_NF).purity_S
    return [
        (latent, value.name, float(purity_S[latent]))
        for latent, value in zip(seen.tolist(), values)
        if value is not None and value.factor == "colour"
    ]


class _Asked:
    """Scenes of one object, none of which an SAE of the demo saw, and the answers to QUESTION about them."""

    def __init__(self, sae: SparseAutoencoder):
        from PIL import Image

        self.answerer = SteeredAnswers(
            *load_llava(f"hf:{LLAVA}", sae.b_dec.device), sae, LAYER, tokens="patches", max_new_tokens=2
        )
        drawn = Scenes(0, "test").batch(N_SCENES["test"], 4 * _N_ASKED)
        alone = np.flatnonzero(drawn.setting[:, SCENE_FACTORS.index("count")] == 0)[:_N_ASKED]
        self.images = [Image.fromarray(image) for image in drawn.images[alone]]
        self.colours = [COLOURS[label] for label in drawn.objects[alone, 0, OBJECT_FACTORS.index("colour")]]
        self.questions = [self.answerer.ask(image, QUESTION) for image in self.images]
        self.before, self.attached = self._answers(None), self._answers(())

    def clamped(self, latent: int, colour: str, purity: float, alpha: float, random: int) -> ColourLatent:
        """How often the answer is `colour` where the object is not."""
        others = [i for i, own in enumerate(self.colours) if own != colour]
        answers = [
            self.before,
            self.attached,
            self._answers((clamp(random, alpha),)),
            self._answers((clamp(latent, alpha),)),
        ]
        shares = [sum(given[i] == colour for i in others) / len(others) for given in answers]
        return ColourLatent(latent, colour, purity, alpha, len(others), *shares)

    def example(self, best: ColourLatent) -> tuple[list["Image"], list[tuple[str, str]]]:
        """The scenes without the latent's colour, and the answers before and after."""
        after = self._answers((clamp(best.latent, best.alpha),))
        others = [i for i, own in enumerate(self.colours) if own != best.colour]
        return [self.images[i] for i in others], [(self.before[i], after[i]) for i in others]

    def _answers(self, edits: tuple[Edit, ...] | None) -> list[str]:
        return self.answerer.answers([SteeredRow(question, edits) for question in self.questions])
