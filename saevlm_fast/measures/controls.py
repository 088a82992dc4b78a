"""Things that cannot have learned what an SAE learns, asked in the same way, at the same L0, made on the fly.

untrained   the recipe's random initialisation of the same size, selecting as the SAE does, of its L0
rotation    a random rotation of the space, both signs of each direction, the largest of each row
raw         the tower's own dimensions around their mean, likewise
pca         principal directions, likewise
kmeans      clusters of the rows: one fires
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.measures.subjects import Centroids, Model, Subject
from saevlm_fast.peers import Peers, shared_chunks, summed
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.controls import FIRST_SEED, select_, untrained_config

CONTROLS = ("untrained", "rotation", "raw", "pca", "kmeans")
SEEDED = ("untrained", "rotation", "kmeans")  # the others have no chance in them
_SAMPLE_ROWS = 4096
_SAMPLE_NUMBERS = 1 << 26  # of the pre-activations by which a threshold is set
_MOST_CLUSTERS = 2048
_ROWS_A_CLUSTER = 10
_FIT_ROWS = 50_000
_ITERATIONS = 10  # a hundred would cost more than all measures together


class Moments(NamedTuple):
    """Of all rows: mean_D and covariance_DD, float64 on the CPU."""

    mean_D: Tensor
    covariance_DD: Tensor

    @classmethod
    def of(cls, activations: Activations, batch_rows: int = 4096, peers: Peers | None = None) -> "Moments":
        """Two passes. peers: the ranks that share them."""
        n = activations.n_rows
        sum_D = torch.zeros(activations.d, dtype=torch.float64)
        for _, x_BD in shared_chunks(peers, activations.chunks, n, batch_rows):
            sum_D += x_BD.double().sum(0)
        mean_D = (sum_D if peers is None else summed(peers, sum_D)) / n
        product_DD = torch.zeros(activations.d, activations.d, dtype=torch.float64)
        for _, x_BD in shared_chunks(peers, activations.chunks, n, batch_rows):
            centred_BD = x_BD.double() - mean_D
            product_DD += centred_BD.T @ centred_BD
        return cls(mean_D, (product_DD if peers is None else summed(peers, product_DD)) / n)


class Wanted(NamedTuple):
    """The SAE whose control is wanted: its shape, its mean L0 on these rows, and where it works."""

    config: SAEConfig
    l0: float
    device: torch.device

    def k(self, most: int) -> int:
        """The L0 as a whole number of latents."""
        return min(max(round(self.l0), 1), most)


def make_controls(
    names: Sequence[str], group: str, wanted: Wanted, n_seeds: int, activations: Activations, moments: Moments
) -> list[Subject]:
    """The controls of a group of SAEs; those with chance in them from as many seeds as there are SAEs."""
    found = []
    for name in names:
        for seed in range(n_seeds if name in SEEDED else 1):
            model = _MAKERS[name](wanted, FIRST_SEED + seed, activations, moments)
            record: dict[str, Any] = {"l0_wanted": wanted.l0, "latents": len(model.W_dec)}
            text = f"{name} {seed} {_made_of(name, wanted, activations.d)} {activations.digest()}"
            label = f"{name} {seed + 1}" if name in SEEDED and n_seeds > 1 else name
            digest = hashlib.sha256(text.encode()).hexdigest()
            found.append(Subject(label, "control", model, group, digest, name, seed, record))
    return found


def _made_of(name: str, wanted: Wanted, d: int) -> tuple[Any, ...]:
    """What decides a control: groups for which it is the same share its measures."""
    if name == "untrained":
        config = untrained_config(wanted.config, wanted.l0)
        return config.d_sae, config.architecture, config.group_sizes, config.k, wanted.l0
    return (wanted.config.d_sae,) if name == "kmeans" else (wanted.k(d),)


def controls_of_ranks(
    peers: Peers | None,
    names: Sequence[str],
    group: str,
    wanted: Wanted,
    n_seeds: int,
    activations: Activations,
    moments: Moments,
) -> list[Subject]:
    """make_controls of rank 0, the same numbers on every rank, each on its own device."""
    if peers is None:
        return make_controls(names, group, wanted, n_seeds, activations, moments)
    made = None
    if peers.rank == 0:
        made = make_controls(names, group, wanted._replace(device=torch.device("cpu")), n_seeds, activations, moments)
    return [replace(each, model=each.model.to(wanted.device)) for each in peers.share(made)]


def untrained(wanted: Wanted, seed: int, activations: Activations, moments: Moments) -> Model:
    """Of the SAE's size, selecting as it does, of its L0 on evenly spaced rows."""
    sae = SparseAutoencoder(untrained_config(wanted.config, wanted.l0), random=False)
    sae.reset_parameters(seed)
    n = min(activations.n_rows, _SAMPLE_ROWS, max(1, _SAMPLE_NUMBERS // sae.config.d_sae))
    rows = torch.linspace(0, activations.n_rows - 1, n).long()
    with torch.no_grad():
        sae.b_dec.copy_(moments.mean_D)
    select_(sae, activations.rows(rows), round(wanted.l0 * n))
    return sae.to(wanted.device)


def rotation(wanted: Wanted, seed: int, activations: Activations, moments: Moments) -> Model:
    """A random orthogonal basis."""
    generator = torch.Generator().manual_seed(seed)
    basis_DD, upper_DD = torch.linalg.qr(torch.randn(activations.d, activations.d, generator=generator).double())
    return signed_basis((basis_DD * upper_DD.diagonal().sign()).T, wanted, moments)


def raw(wanted: Wanted, seed: int, activations: Activations, moments: Moments) -> Model:
    """The dimensions themselves."""
    return signed_basis(torch.eye(activations.d, dtype=torch.float64), wanted, moments)


def pca(wanted: Wanted, seed: int, activations: Activations, moments: Moments) -> Model:
    """Principal directions, the largest variance first."""
    _, vectors_DD = torch.linalg.eigh(moments.covariance_DD)
    return signed_basis(vectors_DD.flip(1).T, wanted, moments)


def signed_basis(rows_RD: Tensor, wanted: Wanted, moments: Moments) -> Model:
    """Orthonormal rows and their negatives as an SAE around the mean: of each row the L0 largest."""
    d_in = rows_RD.shape[1]
    both_SD = torch.cat([rows_RD, -rows_RD])
    sae = SparseAutoencoder(SAEConfig(d_in, len(both_SD), wanted.k(len(rows_RD)), "topk"), random=False)
    with torch.no_grad():
        sae.W_dec.copy_(both_SD)
        sae.W_enc.copy_(both_SD.T)
        sae.b_dec.copy_(moments.mean_D)
    return sae.to(wanted.device)


def kmeans(wanted: Wanted, seed: int, activations: Activations, moments: Moments) -> Model:
    """As many clusters as latents, at most 2,048 and a tenth of the rows."""
    from sklearn.cluster import MiniBatchKMeans

    n_clusters = max(1, min(wanted.config.d_sae, _MOST_CLUSTERS, activations.n_rows // _ROWS_A_CLUSTER))
    rows = torch.linspace(0, activations.n_rows - 1, min(activations.n_rows, _FIT_ROWS)).long()
    x_ND = (activations.rows(rows) - moments.mean_D.float()).numpy()
    fitted = MiniBatchKMeans(n_clusters, random_state=seed, n_init=1, batch_size=4096, max_iter=_ITERATIONS).fit(x_ND)
    centers_SD = torch.from_numpy(fitted.cluster_centers_).float() + moments.mean_D.float()
    mean_D = moments.mean_D.float()
    return Centroids(centers_SD.to(wanted.device), float(fitted.inertia_) / len(x_ND), mean_D.to(wanted.device))


_MAKERS: dict[str, Callable[[Wanted, int, Activations, Moments], Model]] = {
    "untrained": untrained,
    "rotation": rotation,
    "raw": raw,
    "pca": pca,
    "kmeans": kmeans,
}
