"""Scenes of the box, of which the truth is known: as tiny-clip's activations, as its embeddings, and as labels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.demo.ground_truth import CONCEPTS, VALUE_DEPTH, concept_presence, latent_concepts
from saevlm_fast.demo.scene_stores import LAYER, harvest_scenes
from saevlm_fast.images.scenes import scene_labels
from saevlm_fast.sae import SparseAutoencoder


@dataclass(frozen=True)
class LabelledScenes:
    """The same scenes three times; labels as scene_labels gives them."""

    activations: Activations
    embeddings: Activations
    labels: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, split: str, n: int, layer: int = LAYER, tokens: str = "cls") -> "LabelledScenes":
        """The first n of a split; arguments as harvest_scenes takes them."""
        print(f"{n:,} scenes of {split}", flush=True)
        stores = harvest_scenes(split, n, layer, tokens)
        activations = open_activations(stores.activations)
        labels = scene_labels(activations.items()["image"].to_pylist())
        return cls(activations, open_activations(stores.embeddings), labels)

    def ideal(self) -> Activations:
        """What the ideal encoder gives: one number for each value of each factor, 1 where a scene shows it."""
        values = [c for c, concept in enumerate(CONCEPTS) if concept.depth == VALUE_DEPTH]
        return Activations.from_tensor(torch.from_numpy(concept_presence(*self.labels)[:, values]).float())

    def purity(self, sae: SparseAutoencoder) -> Tensor:
        """[S]: purity of each latent above base, as a share of what is possible; NaN where it is undefined."""
        truth = latent_concepts(self.activations, *self.labels, sae)
        return truth.purity_S / (1 - truth.base_C[truth.value_S.clamp(min=0)])
