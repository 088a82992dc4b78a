"""The numbers by which latents are sorted and filtered: each one column, from this pass or from tables."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from saevlm_fast.look.chunks import short
from saevlm_fast.look.looked import Looked
from saevlm_fast.look.tables import numeric_columns, spread
from saevlm_fast.steering.table import CONDITIONS, EMPTY

_MOST = 40  # columns of a table that are taken over
_MOST_TEXTS, _LONGEST_TEXT = 6, 300
# What is known of columns by their names, wherever they come from: label, and a sentence.
KNOWN = {
    "density": ("density", "Share of the images on which the latent fires."),
    "row_density": ("token density", "Share of the rows (tokens) on which it fires."),
    "n_active": ("images", "Images on which it fires."),
    "max": ("max", "Its largest activation."),
    "mean": ("mean", "Its mean activation where it fires."),
    "ms": (
        "MS",
        "Monosemanticity Score: how alike its images are to the encoder, weighted by activation.",
    ),
    "purity": ("purity", "Share of its activation that is on images of its best class."),
    "entropy": ("entropy", "Of its activation over the classes, in bits; 0 is one class alone."),
    "decoder_cosine": ("nearest cos", "Cosine with the nearest other decoder direction; near 1 is a double."),
    "jaccard": ("co-firing", "Largest Jaccard index with another latent: images of both by images of either."),
    "corrected": ("MS corrected", "The score freed of what images have in common and of how few there are."),
    "n_eff": ("n eff", "As many images of equal weight would say as much."),
    "z": ("z", "The score above that of random images, in standard deviations."),
    "p": ("p", "How often random images score as high."),
    "ms_low": ("MS low", "Lower end of the score's interval of 95 %, over images."),
    "ms_high": ("MS high", "Upper end of the score's interval of 95 %, over images."),
    "uniqueness": (
        "uniqueness",
        "1 less the Jaccard index of its top 16 images with the nearest latent's.",
    ),
    "lca_depth": ("depth", "Mean depth of the lowest common ancestor of its top 16 images' classes."),
    "steered": ("steered", "Steering score: how near the steered answers come to its images."),
    "name_score": ("name score", "By how much its best word is nearer than the average one."),
}


@dataclass(frozen=True)
class Measure:
    """A column: key, label, what it means, and float64 [S] with NaN where it is not known."""

    key: str
    label: str
    help: str
    values: np.ndarray

    @property
    def is_there(self) -> bool:
        return bool(np.isfinite(self.values).any())


def measures_of(
    looked: Looked,
    image_scores: dict[str, np.ndarray],
    scores: pa.Table | None,
    names: pa.Table | None,
    steering: pa.Table | None,
) -> list[Measure]:
    """All measures that are known of at least one latent; a table's column stands for the computed one of its name."""
    stats, size = looked.stats, looked.size
    n_active = stats.n_active_S.numpy().astype(np.float64)
    fires = n_active > 0
    nothing = np.full(size, np.nan)
    purity, entropy = _class_measures(looked)
    found: dict[str, np.ndarray] = {
        "density": n_active / stats.n_images,
        "row_density": looked.row_density_S if looked.subject.table.rows_per_image > 1 else nothing,
        **image_scores,
        "max": np.where(fires, stats.max_S.double().numpy(), np.nan),
        "mean": np.divide(stats.sum_S.numpy(), n_active, out=nothing.copy(), where=fires),
        "n_active": n_active,
        "purity": purity,
        "entropy": entropy,
        "decoder_cosine": looked.decoder.values[:, 0].double().numpy() if size > 1 else nothing,
        "jaccard": np.where(fires, looked.firing.together.values[:, 0].double().numpy(), np.nan)
        if size > 1
        else nothing,
        "uniqueness": looked.sets.uniqueness_S,
        "lca_depth": nothing if looked.sets.depth_S is None else looked.sets.depth_S,
    }
    if steering is not None and "steered" in numeric_columns(steering):
        found["steered"] = spread(steering, "steered", size)
    if scores is not None:
        for name in numeric_columns(scores)[:_MOST]:
            if name != "max_activation":
                found[name] = spread(scores, name, size)
    if names is not None and "score" in names.column_names:
        found["name_score"] = spread(names, "score", size)
    made = [
        Measure(key, *KNOWN.get(key, (key.replace("_", " "), "From the table of scores.")), v)
        for key, v in found.items()
    ]
    return [each for each in made if each.is_there]


def _class_measures(looked: Looked) -> tuple[np.ndarray, np.ndarray]:
    nothing = np.full(looked.size, np.nan)
    if looked.stats.classes_SC is None:
        return nothing, nothing
    sums_SC = looked.stats.classes_SC.numpy()
    total_S = sums_SC.sum(axis=1, keepdims=True)
    share_SC = np.divide(sums_SC, total_S, out=np.zeros_like(sums_SC), where=total_S > 0)
    logs = np.log2(share_SC, out=np.zeros_like(share_SC), where=share_SC > 0)
    fires = total_S[:, 0] > 0
    return np.where(fires, share_SC.max(axis=1), np.nan), np.where(fires, -(share_SC * logs).sum(axis=1), np.nan)


def names_of(table: pa.Table | None, size: int) -> tuple[list[str | None], list[list[list[Any]]]]:
    """Of every latent its own name, and its nearest words with their scores; from a table of `saevlm-fast name`."""
    own: list[str | None] = [None] * size
    words: list[list[list[Any]]] = [[] for _ in range(size)]
    if table is None:
        return own, words
    numbered = [i for i in range(1, 33) if {f"word_{i}", f"score_{i}"} <= set(table.column_names)]
    columns = ["latent", *(["name"] if "name" in table.column_names else [])]
    columns += [f"{kind}_{i}" for i in numbered for kind in ("word", "score")]
    for row in table.select(columns).to_pylist():
        name = row.get("name")
        own[row["latent"]] = None if name is None else str(name)
        pairs = [(row[f"word_{i}"], row[f"score_{i}"]) for i in numbered]
        words[row["latent"]] = [
            [str(word), round(float(score), 4)] for word, score in pairs if word and score is not None
        ]
    return own, words


def texts_of(table: pa.Table | None) -> dict[str, dict[int, str]]:
    """Columns of texts of a table of scores, as an evaluation's best label: column -> latent -> text."""
    if table is None:
        return {}
    kinds = [(field.name, field.type) for field in table.schema]
    texts = [name for name, kind in kinds if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    latents = table["latent"].to_pylist()
    return {
        name: {latent: text[:_LONGEST_TEXT] for latent, text in zip(latents, table[name].to_pylist()) if text}
        for name in texts[:_MOST_TEXTS]
    }


def steered_of(table: pa.Table | None) -> dict[int, dict[str, Any]]:
    """Rows of `saevlm-fast steering-score`: latent -> answer, its share, and [condition, score, empty] of each."""
    if table is None:
        return {}
    there = set(table.column_names)
    conditions = [name for name in CONDITIONS if name in there]
    found = {}
    for row in table.to_pylist():
        kept = [[name, row[name], row.get(name + EMPTY)] for name in conditions if row[name] is not None]
        kept = [[name, *(short(float(each)) if each is not None else None for each in pair)] for name, *pair in kept]
        answer, share = row.get("answer"), row.get("answer_share")
        found[row["latent"]] = {
            "answer": None if answer is None else str(answer)[:_LONGEST_TEXT],
            "share": None if share is None else short(float(share)),
            "rows": kept,
        }
    return found
