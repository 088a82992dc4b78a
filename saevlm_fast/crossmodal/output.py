"""The directory that cross-modal writes, whole or not at all.

latents.parquet     a row a latent: omega, rows on which it fires, its top tokens (texts, images, places)
samples.parquet     a row a pair: scores, controls, whether it is kept, and is wrong, if that is known
patches.parquet     a row an image token: pair, row of the store, place among the image's, scores, kept
patch_test.parquet  a row a pair, filter and share: what the model says with the kept tokens alone (patch_test.py)
kept.txt            ids of the pairs that are kept, in the store's order
cross_modal.json    settings and summary; sealed (records.py)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saevlm_fast.crossmodal.measure import CrossModal
from saevlm_fast.crossmodal.patch_test import PatchTest
from saevlm_fast.crossmodal.patches import PATCH_SCORES, Patches, kept_patches
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.files import atomic_write, remove_leftovers
from saevlm_fast.outputs import begin_replacement, publish, settle
from saevlm_fast.records import write_record
from saevlm_fast.scoring.tables import write_table

SUMMARY, KEPT = "cross_modal.json", "kept.txt"
_TABLES = ("latents.parquet", "samples.parquet", "patches.parquet", "patch_test.parquet")
_PATCHES = pa.schema(
    {"sample": pa.int64(), "row": pa.int64(), "patch": pa.int32()}
    | dict.fromkeys(PATCH_SCORES, pa.float64())
    | {"co_occurrence": pa.int32(), "count": pa.int32(), "kept": pa.bool_()}
)


def check_cross_modal_output(output: Path, force: bool) -> None:
    """ValueError: results, or something else, are where these would go. Nothing is touched."""
    require(output.is_dir() or not output.exists(), f"output: {output} is not a directory")
    ours = (output / SUMMARY).exists()
    require(not ours or force, f"output: {output} already holds results; --force replaces them")
    others = [path.name for path in output.iterdir() if not path.name.startswith(".")] if output.is_dir() else []
    require(ours or not others, f"output: {output} is not empty and holds no {SUMMARY}")


@contextmanager
def new_results(output: Path, force: bool) -> Iterator[Path]:
    """A place for results, which become the output's when the block is left without an error. The output is locked."""
    settle(output, _remove_results)
    check_cross_modal_output(output, force)
    remove_leftovers(output)
    place = begin_replacement(output)
    yield place
    publish(output, _remove_results)


def _remove_results(output: Path) -> None:
    for name in (*_TABLES, KEPT, SUMMARY, "settings.toml"):
        (output / name).unlink(missing_ok=True)


@contextmanager
def patches_written(place: Path, share: float, by: str) -> Iterator[Callable[[Patches], None]]:
    """What takes image tokens, pair by pair, into patches.parquet; share: kept of each pair's, by a score."""
    path = place / _TABLES[2]
    with atomic_write(path) as temporary, open(temporary, "wb") as file, pq.ParquetWriter(file, _PATCHES) as writer:

        def write(patches: Patches) -> None:
            columns = patches.columns | {"kept": kept_patches(patches, share, by)}
            arrays = [pa.array(columns[field.name]).cast(field.type) for field in _PATCHES]
            writer.write_table(pa.Table.from_arrays(arrays, schema=_PATCHES))

        yield write


def read_patches(place: Path, samples: np.ndarray) -> Patches:
    """What patches.parquet says of these pairs."""
    table = pq.read_table(place / _TABLES[2], filters=[("sample", "in", samples.tolist())])
    return Patches(*(table[name].to_numpy() for name in _PATCHES.names[:-1]))


def write_patch_test(place: Path, test: PatchTest) -> None:
    """The table of the test of patch filters."""
    write_table(test.table(), place / _TABLES[3])


def write_results(place: Path, found: CrossModal, activations: Activations, summary: dict[str, Any]) -> None:
    """All but the patches, and the test of their filters."""
    write_table(found.latents_table(activations), place / _TABLES[0])
    write_table(found.samples_table(), place / _TABLES[1])
    kept = [name for name, keep in zip(found.ids, found.columns["kept"]) if keep]
    with atomic_write(place / KEPT) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in kept), encoding="utf-8")
    write_record(place / SUMMARY, summary)


def summary_of(found: CrossModal, seed: int) -> dict[str, Any]:
    """JSON: how many latents are of which kind, what omegas are like, what was kept, how well wrong pairs are found."""
    omega, text, image = found.omega_S, found.text, found.image
    scored = omega[~np.isnan(omega)]
    points = np.percentile(scored, [5, 25, 50, 75, 95]).tolist() if len(scored) else []
    return {
        "pairs": len(found.ids),
        "kept": int(found.columns["kept"].sum()),
        "latents": len(omega),
        "latent_kinds": {
            "scored": len(scored),
            "text_only": int((text.full_S & ~image.full_S).sum()),
            "image_only": int((image.full_S & ~text.full_S).sum()),
            "rare": int((~text.full_S & ~image.full_S).sum()),
        },
        "omega_percentiles_5_25_50_75_95": points,
        "wrong": None if found.wrong_P is None else int(found.wrong_P.sum()),
        "detection": found.detection(seed),
        "kept_wrong": None if found.wrong_P is None else int((found.wrong_P & found.columns["kept"]).sum()),
    }
