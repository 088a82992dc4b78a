"""Activations with planted concepts: an image shows a few of many, its activation is their superposition.

For the first run on a fresh machine, for tests and for benches: no download, any size, the truth is known. A concept
has a direction in activation space and one in embedding space; images that share concepts have similar embeddings, so a
latent that has found a concept is monosemantic, and a raw neuron, which mixes many concepts, is not.
"""

from pathlib import Path

import numpy as np

from saevlm_fast.errors import require
from saevlm_fast.files import atomic_write, remove_leftovers_of
from saevlm_fast.outputs import check_absent, output_lock

ACTIVATIONS_FILE, EMBEDDINGS_FILE = "activations.npy", "embeddings.npy"
_BLOCK = 8192


class PlantedConcepts:
    """A seeded source of (activations, embeddings).

    Args:
        d_in: width of the activations. d_embedding: width of the image embeddings.
        n_concepts: planted concepts; more than d_in puts them in superposition.
        concepts_per_image: mean number of concepts an image shows (at least one, Poisson).
        noise: standard deviation of activation noise, relative to a concept's direction of norm 1.
        seed: fixes the concepts and every image.
    """

    def __init__(
        self,
        d_in: int = 128,
        d_embedding: int = 64,
        n_concepts: int = 400,
        concepts_per_image: float = 3.0,
        noise: float = 0.02,
        seed: int = 0,
    ):
        for name, value in (("d_in", d_in), ("d_embedding", d_embedding), ("n_concepts", n_concepts)):
            require(value >= 1, f"{name}: {value} must be at least 1")
        rng = np.random.default_rng([seed, 0])
        self.directions_CD = _unit_rows(rng.standard_normal((n_concepts, d_in)))
        self.embeddings_CE = _unit_rows(rng.standard_normal((n_concepts, d_embedding)))
        self.offset_D = rng.standard_normal(d_in)
        self.popularity_C = 1.0 / np.arange(1, n_concepts + 1) ** 0.5  # some concepts are common, most are rare
        self.popularity_C /= self.popularity_C.sum()
        self.concepts_per_image, self.noise, self.seed = concepts_per_image, noise, seed

    def block(self, index: int, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The index-th block of images: float32 activations [n_rows, d_in] and embeddings [n_rows, d_embedding]."""
        rng = np.random.default_rng([self.seed, 1, index])
        n_concepts = len(self.popularity_C)
        per_image_N = 1 + rng.poisson(max(self.concepts_per_image - 1, 0.0), n_rows)
        images_P = np.repeat(np.arange(n_rows), per_image_N)
        concepts_P = rng.choice(n_concepts, size=len(images_P), p=self.popularity_C)
        strength_NC = np.zeros((n_rows, n_concepts))
        strength_NC[images_P, concepts_P] = rng.uniform(0.5, 1.5, len(images_P))
        x_ND = strength_NC @ self.directions_CD + self.offset_D
        x_ND += self.noise * rng.standard_normal(x_ND.shape)
        e_NE = strength_NC @ self.embeddings_CE
        e_NE += 0.1 * rng.standard_normal(e_NE.shape) / np.sqrt(e_NE.shape[1])
        return x_ND.astype(np.float32), e_NE.astype(np.float32)

    def sample(self, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The first n_rows images in memory."""
        blocks = [self.block(i, min(_BLOCK, n_rows - start)) for i, start in enumerate(range(0, n_rows, _BLOCK))]
        return np.concatenate([x for x, _ in blocks]), np.concatenate([e for _, e in blocks])


def write_synthetic(
    directory: str | Path, n_rows: int, source: PlantedConcepts, force: bool = False
) -> tuple[Path, Path]:
    """Write activations.npy [n_rows, d_in] and embeddings.npy [n_rows, d_embedding], both once both are whole.

    Raises:
        ValueError: n_rows below 1; one of the files is there and not to be replaced (force); the directory is in use by
            another process, or cannot be written.
    """
    require(n_rows >= 1, f"rows: {n_rows} must be at least 1")
    directory = Path(directory)
    paths = directory / ACTIVATIONS_FILE, directory / EMBEDDINGS_FILE
    with output_lock(directory, directory=True):
        check_absent(paths, force)
        for path in paths:
            remove_leftovers_of(path)
        x_ND, e_NE = source.sample(n_rows)
        with atomic_write(paths[0]) as activations, atomic_write(paths[1]) as embeddings:
            np.save(activations, x_ND, allow_pickle=False)
            np.save(embeddings, e_NE, allow_pickle=False)
    return paths


def _unit_rows(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
