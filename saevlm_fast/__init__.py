"""saevlm-fast: sparse autoencoders for vision-language models on Triton kernels (arXiv 2504.02821).

An SAE is trained on activations [N, d_in] and scored by how alike the images are that its latents fire on; row i of the
activations and of the embeddings [N, d] is image i:

    >>> import saevlm_fast as sf
    >>> from saevlm_fast.data.synthetic import PlantedConcepts
    >>> x, embeddings = PlantedConcepts(d_in=64, d_embedding=32, n_concepts=50).sample(2000)
    >>> activations = sf.Activations.from_tensor(x)
    >>> sae, metrics = sf.train(activations, sf.SAEConfig.sized(64, k=3), steps=100, batch_size=512, lr=3e-3)
    >>> metrics["explained_variance"] > 0.5
    True
    >>> table = sf.score(activations, sf.Activations.from_tensor(embeddings), sae).table()
    >>> table.column_names
    ['latent', 'ms', 'status', 'n_active', 'max_activation']

Names are imported when they are first used, so that `import saevlm_fast` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saevlm_fast.config import HarvestOptions, RunOptions, SAEConfig, SAESize, StreamSettings, TrainConfig
    from saevlm_fast.crossmodal.measure import CrossModal, cross_modal
    from saevlm_fast.data.codes import CodesWriter, StoredCodes, open_codes
    from saevlm_fast.data.label_sets import LabelSet
    from saevlm_fast.data.rows import Activations, open_activations
    from saevlm_fast.data.store import verify
    from saevlm_fast.data.writing import ActivationWriter
    from saevlm_fast.errors import ActivationError, ImageError, Interrupted
    from saevlm_fast.harvesting.api import harvest
    from saevlm_fast.harvesting.config import HarvestConfig
    from saevlm_fast.images.open import open_images
    from saevlm_fast.inspection import inspect
    from saevlm_fast.look.show import ShownLatent, show
    from saevlm_fast.measures.evaluation import Evaluation
    from saevlm_fast.measures.measure import measure
    from saevlm_fast.measures.taxonomy import Taxonomy
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.scoring.monosemanticity import MonosemanticityScores, score
    from saevlm_fast.scoring.top_images import TopImages, top_images
    from saevlm_fast.scoring.trust import TrustedScores, rank_agreement, trusted_score, trusted_scores
    from saevlm_fast.sparse_codes import SparseCodes
    from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
    from saevlm_fast.steering.edits import Edit, add, clamp, scale, steer, steer_rows, zero
    from saevlm_fast.steering.language import LanguageAnswers
    from saevlm_fast.towers.language import LanguageTower, load_language
    from saevlm_fast.towers.load import load_tower
    from saevlm_fast.towers.text import load_llava, load_text_encoder
    from saevlm_fast.towers.tower import Tower
    from saevlm_fast.training.evaluate import evaluate
    from saevlm_fast.training.many import Trained, train_many
    from saevlm_fast.training.one_pass import train_from_images
    from saevlm_fast.training.run import train

__version__ = "0.1.0"
__all__ = [
    "ActivationError",
    "ActivationWriter",
    "Activations",
    "CodesWriter",
    "CrossModal",
    "Edit",
    "Evaluation",
    "HarvestConfig",
    "HarvestOptions",
    "ImageError",
    "Interrupted",
    "LabelSet",
    "LanguageAnswers",
    "LanguageTower",
    "MonosemanticityScores",
    "RunOptions",
    "SAEConfig",
    "SAESize",
    "ShownLatent",
    "SparseAutoencoder",
    "SparseCodes",
    "SteeredAnswers",
    "SteeredRow",
    "StoredCodes",
    "StreamSettings",
    "Taxonomy",
    "TopImages",
    "Tower",
    "TrainConfig",
    "Trained",
    "TrustedScores",
    "__version__",
    "add",
    "clamp",
    "cross_modal",
    "evaluate",
    "harvest",
    "inspect",
    "load_language",
    "load_llava",
    "load_text_encoder",
    "load_tower",
    "measure",
    "open_activations",
    "open_codes",
    "open_images",
    "rank_agreement",
    "scale",
    "score",
    "show",
    "steer",
    "steer_rows",
    "top_images",
    "train",
    "train_from_images",
    "train_many",
    "trusted_score",
    "trusted_scores",
    "verify",
    "zero",
]

# Where each name is; the same as the imports above, which only type checkers and editors see (a test compares them).
_HOMES = {
    "config": ("HarvestOptions", "RunOptions", "SAEConfig", "SAESize", "StreamSettings", "TrainConfig"),
    "crossmodal.measure": ("CrossModal", "cross_modal"),
    "data.codes": ("CodesWriter", "StoredCodes", "open_codes"),
    "data.label_sets": ("LabelSet",),
    "data.rows": ("Activations", "open_activations"),
    "data.store": ("verify",),
    "data.writing": ("ActivationWriter",),
    "errors": ("ActivationError", "ImageError", "Interrupted"),
    "harvesting.api": ("harvest",),
    "harvesting.config": ("HarvestConfig",),
    "images.open": ("open_images",),
    "inspection": ("inspect",),
    "measures.evaluation": ("Evaluation",),
    "measures.measure": ("measure",),
    "measures.taxonomy": ("Taxonomy",),
    "look.show": ("ShownLatent", "show"),
    "sae": ("SparseAutoencoder",),
    "scoring.monosemanticity": ("MonosemanticityScores", "score"),
    "scoring.top_images": ("TopImages", "top_images"),
    "scoring.trust": ("TrustedScores", "rank_agreement", "trusted_score", "trusted_scores"),
    "sparse_codes": ("SparseCodes",),
    "steering.answers": ("SteeredAnswers", "SteeredRow"),
    "steering.edits": ("Edit", "add", "clamp", "scale", "steer", "steer_rows", "zero"),
    "steering.language": ("LanguageAnswers",),
    "towers.language": ("LanguageTower", "load_language"),
    "towers.load": ("load_tower",),
    "towers.text": ("load_llava", "load_text_encoder"),
    "towers.tower": ("Tower",),
    "training.evaluate": ("evaluate",),
    "training.many": ("Trained", "train_many"),
    "training.one_pass": ("train_from_images",),
    "training.run": ("train",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, imported now. AttributeError: no such name, with the nearest that there is."""
    if name in _HOME_OF:
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        return value
    from saevlm_fast.errors import did_you_mean

    raise AttributeError(f"{__name__} has no {name!r}{did_you_mean(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
