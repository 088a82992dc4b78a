"""What a latent stands for, by the labels of scenes: the truth that the Monosemanticity Score is checked against.

The activation-weighted share of a concept, share_kc = sum_i r_ik p_ic / sum_i r_ik with r as in the score
(docs/recipe.md section 3) and p_ic = 1 if image i shows concept c, is the weighted mean of a vector that every image
has. The score's own sums hold it with p in the place of the embeddings, streamed, exact, for sparse codes and dense
neurons alike.

Shape suffixes: N images, S latents, C concepts, O objects, F factors, K images of a latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saevlm_fast.box.scenes import OBJECT_FACTORS, SCENE_FACTORS, TAXONOMY, VALUES, value_prompts
from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.rows import Activations
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import streamed_score
from saevlm_fast.scoring.naming import Words
from saevlm_fast.scoring.top_images import TopImages

VALUE_DEPTH = 2


class Concept(NamedTuple):
    """A node of the taxonomy: a value at depth 2 ("red"), a group of values at depth 1 ("warm")."""

    factor: str
    name: str
    depth: int


def _concepts() -> list[Concept]:
    """Groups before their values. A group of one value (large, single) is that value's images and left out."""
    found = []
    for factor, groups in TAXONOMY.items():
        for group, values in groups.items():
            found += [Concept(factor, group, 1)] if len(values) > 1 else []
            found += [Concept(factor, value, VALUE_DEPTH) for value in values]
    return found


CONCEPTS = tuple(_concepts())
FACTORS = tuple(TAXONOMY)


def scene_words() -> Words:
    """Every value of every factor of the box's scenes: "red" as "a red thing", "teal" as "a scene on teal"."""
    words = [word for values in VALUES.values() for word in values]
    return Words(words, [text for factor in VALUES for text in value_prompts(factor)])


def concept_presence(objects_NOF: np.ndarray, setting_NF: np.ndarray) -> np.ndarray:
    """bool [N, C]: whether any object of an image, or the scene itself, has each of CONCEPTS.

    Args:
        objects_NOF, setting_NF: labels as in scenes.SceneBatch; -1 is no object.
    """
    columns = []
    for concept in CONCEPTS:
        if concept.factor in OBJECT_FACTORS:
            labels = objects_NOF[:, :, OBJECT_FACTORS.index(concept.factor)]
        else:
            labels = setting_NF[:, SCENE_FACTORS.index(concept.factor)][:, None]
        members = TAXONOMY[concept.factor].get(concept.name, (concept.name,))
        columns.append(np.isin(labels, [VALUES[concept.factor].index(value) for value in members]).any(axis=1))
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class LatentConcepts:
    """What every latent stands for; tensors on the CPU. Where the score is not defined: NaN, and -1 for a concept.

    Attributes:
        share_SC: float64, the activation-weighted share of each of CONCEPTS. base_C: the share over all images.
        value_S, purity_S: the value with the largest share - base (an index into CONCEPTS), and that difference. A
            latent that fires on exactly the images of a value has purity 1 - base.
        concept_S, depth_S: the concept at any depth that the latent correlates with most, and its depth (float64).
            Over concepts, (share - base) / sqrt(base (1 - base)) is proportional to the correlation of activation and
            presence: it is largest for the concept a latent equals, whatever constant is added to the activations, and
            a latent without any concept is drawn to common ones (groups) no more than to rare ones.
    """

    share_SC: Tensor
    base_C: Tensor
    value_S: Tensor
    purity_S: Tensor
    concept_S: Tensor
    depth_S: Tensor


def latent_concepts(
    activations: Activations | StoredCodes,
    objects_NOF: np.ndarray,
    setting_NF: np.ndarray,
    sae: SparseAutoencoder | None = None,
    *,
    batch_rows: int = 4096,
    device: torch.device | str = "cpu",
) -> LatentConcepts:
    """Compares latents of an SAE, of stored codes, or raw neurons (as monosemanticity.score) with the labels.

    Args:
        activations: one row an image, read chunk by chunk. objects_NOF, setting_NF: its labels, as concept_presence.

    Raises:
        ValueError: labels of another number of images, and what monosemanticity.score refuses.
    """
    present_NC = torch.from_numpy(concept_presence(objects_NOF, setting_NF))
    labels = Activations.from_tensor(present_NC.float())
    sums = streamed_score(activations, labels, sae, similarity="dot", batch_rows=batch_rows, device=device)
    return best_concepts(sums.mean_embedding().cpu(), present_NC.double().mean(0))


def best_concepts(share_SC: Tensor, base_C: Tensor) -> LatentConcepts:
    """The best value and the best concept by the shares; a latent of NaN shares has none."""
    undefined_S = share_SC.isnan().any(1)
    above_SC = torch.where(undefined_S[:, None], 0.0, share_SC - base_C)
    depth_C = torch.tensor([concept.depth for concept in CONCEPTS], dtype=torch.float64)
    purity_S, value_S = above_SC.masked_fill(depth_C != VALUE_DEPTH, -torch.inf).max(1)
    spread_C = (base_C * (1 - base_C)).sqrt()
    # A concept that all images show, or none, says nothing.
    concept_S = torch.where(spread_C > 0, above_SC / spread_C, -torch.inf).argmax(1)
    return LatentConcepts(
        share_SC=share_SC,
        base_C=base_C,
        value_S=value_S.masked_fill(undefined_S, -1),
        purity_S=purity_S.masked_fill(undefined_S, torch.nan),
        concept_S=concept_S.masked_fill(undefined_S, -1),
        depth_S=depth_C[concept_S].masked_fill(undefined_S, torch.nan),
    )


# The most activating images, and how much they have in common -------------------------------------------------------


def common_depth(tops: Sequence[TopImages], objects_NOF: np.ndarray, setting_NF: np.ndarray) -> Tensor:
    """float64 [S, F]: how deep in each factor's taxonomy a latent's images meet, the mean over pairs of them.

    The paper's mean depth of the lowest common ancestor (docs/recipe.md section 4), of images with several objects: a
    pair meets at the deepest node that both images show, 2 for a common value, 1 for a common group, 0 for neither.

    Args:
        tops: of S latents, as top_images gives them (the paper takes 16). NaN for a latent with fewer than two.
    """
    images_SK = pad_sequence([top.images for top in tops], batch_first=True, padding_value=-1)
    present_NC = torch.from_numpy(concept_presence(objects_NOF, setting_NF))
    there_SK = images_SK >= 0
    pairs_SKK = (there_SK[:, :, None] & there_SK[:, None, :]).triu(1)
    depth_SF = torch.empty(len(images_SK), len(FACTORS), dtype=torch.float64)
    for f, factor in enumerate(FACTORS):
        meet_SKK = torch.zeros(pairs_SKK.shape)
        for depth in (1, VALUE_DEPTH):
            chosen = [c for c, concept in enumerate(CONCEPTS) if (concept.factor, concept.depth) == (factor, depth)]
            shown_SKc = present_NC[:, chosen][images_SK.clamp_min(0)].float()
            meet_SKK[shown_SKc @ shown_SKc.mT > 0] = depth
        depth_SF[:, f] = (meet_SKK * pairs_SKK).sum((1, 2), dtype=torch.float64) / pairs_SKK.sum((1, 2))
    return depth_SF


def shared_value(tops: Sequence[TopImages], objects_NOF: np.ndarray, setting_NF: np.ndarray) -> list[Concept | None]:
    """The value that every one of a latent's top images shows, the rarest of several; None if there is none.

    A latent whose 16 most activating images share a value is called well defined (its purity may still be low: 16
    images say nothing of the others). None for a latent without images, too.
    """
    present_NC = torch.from_numpy(concept_presence(objects_NOF, setting_NF))
    values = [c for c, concept in enumerate(CONCEPTS) if concept.depth == VALUE_DEPTH]
    rarest_first = sorted(values, key=lambda c: float(present_NC[:, c].float().mean()))
    shared = [present_NC[top.images].all(0) if len(top.images) else torch.zeros(len(CONCEPTS)) for top in tops]
    return [next((CONCEPTS[c] for c in rarest_first if shared_C[c]), None) for shared_C in shared]


def chance_depth(objects_NOF: np.ndarray, setting_NF: np.ndarray) -> Tensor:
    """float64 [F]: common_depth of two unrelated images, over scenes 0 and 1, 2 and 3, and so on."""
    pairs_P2 = torch.arange(len(objects_NOF) // 2 * 2).view(-1, 2)
    return common_depth([TopImages(pair, pair) for pair in pairs_P2], objects_NOF, setting_NF).mean(0)


def best_factor_depth(depth_SF: Tensor, chance_F: Tensor) -> Tensor:
    """float64 [S]: common_depth in the factor in which it is furthest above chance, NaN for a latent without images.

    The paper's labels are one species an image; here each image has values of eight factors, and any two images have
    some of them in common, so neither the mean nor the maximum over factors says much about a latent.
    """
    factor_S = (depth_SF - chance_F).argmax(1, keepdim=True)
    return depth_SF.gather(1, factor_S).squeeze(1)
