"""The files of a checkpoint: written by one process, or by every rank its part; read by any number of ranks.

    train_state.safetensors                     all of it, of one process; or, of R ranks,
    train_state_RRRR_of_RRRR.safetensors        the latents start .. stop - 1 of a rank, and what all have in common
    checkpoint.json                             {"n_steps", "n_rows_seen", "files" or "shards", "metrics"}, sealed

"files" has the SHA-256 of each file by its name; "shards" is a list of {"file", "start", "stop", "sha256"}. A tensor of
latents has them in its first dimension.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saevlm_fast.errors import first_line, require
from saevlm_fast.files import save_safetensors_atomic, sha256_file
from saevlm_fast.records import DIGEST, FILE_NAME, Each, Fields, Schema, check_record, read_record, whole
from saevlm_fast.sae import CONFIG_FILE, WEIGHTS_FILE

STATE_FILE, CHECKPOINT_FILE = "train_state.safetensors", "checkpoint.json"
_OF_LATENTS = ("W_enc", "b_enc", "W_dec", "idle", "threshold")  # and their moments; a threshold only if it has latents
_METRICS = Fields({"bytes": whole(), "sha256": DIGEST}, others=False)
_COUNTS: dict[str, Schema] = {"n_steps": whole(), "n_rows_seen": whole(), "metrics": _METRICS}
_FILES = Fields({CONFIG_FILE: DIGEST, WEIGHTS_FILE: DIGEST, STATE_FILE: DIGEST}, others=False)
_WHOLE = Fields(_COUNTS | {"files": _FILES}, others=False)
_SHARD = Fields({"file": FILE_NAME, "start": whole(), "stop": whole(1), "sha256": DIGEST}, others=False)
_SHARDED = Fields(_COUNTS | {"shards": Each(_SHARD)}, others=False)


class StateFile(NamedTuple):
    """A file of a state: latents start .. stop - 1, or all if stop is None; its digest, of a rank's file."""

    path: Path
    start: int
    stop: int | None
    sha256: str | None

    def overlaps(self, start: int, stop: int | None) -> bool:
        """Whether it has any of these latents."""
        return (stop is None or self.start < stop) and (self.stop is None or start < self.stop)


def write_state(path: Path, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> str:
    """Writes a file of a state with its counts in the header, atomically. Returns its SHA-256."""
    save_safetensors_atomic(path, tensors, metadata={name: str(count) for name, count in counts.items()})
    return sha256_file(path)


def shard_file(rank: int, world: int) -> str:
    """Name of a rank's file."""
    stem, suffix = STATE_FILE.split(".")
    return f"{stem}_{rank:04d}_of_{world:04d}.{suffix}"


def checkpoint_record(checkpoint: Path) -> dict[str, Any] | None:
    """What checkpoint.json says; None of a checkpoint of before it was written. ValueError: damaged or altered."""
    path = checkpoint / CHECKPOINT_FILE
    if not path.exists():
        return None
    record = read_record(path, Fields())
    check_record(record, _SHARDED if "shards" in record else _WHOLE, path, ValueError)
    return record


def holds_sae(checkpoint: Path) -> bool:
    """Whether a checkpoint is an SAE that can be opened, which that of several ranks is not."""
    return "shards" not in (checkpoint_record(checkpoint) or {})


def check_checkpoint(checkpoint: Path, start: int = 0, stop: int | None = None) -> tuple[int, int]:
    """Steps and rows at a checkpoint, whose files are as they were written (of one of before, as far as can be told).

    start, stop: of several ranks' files, only those that have any of these latents are looked at.

    Raises:
        ValueError: a file that is missing, damaged or altered; ranks' files that do not have all latents.
    """
    record = checkpoint_record(checkpoint)
    for name, digest in ((record or {}).get("files") or {}).items():
        _check_digest(checkpoint / name, digest)
    files = [file for file in _state_files(checkpoint, record) if file.overlaps(start, stop)]
    for file in files if record and "shards" in record else []:
        _check_digest(file.path, str(file.sha256))
    counts = {_counts(file.path) for file in files}
    require(len(counts) == 1, f"{checkpoint}: its files are of different steps")
    (found,) = counts
    require(
        checkpoint.name == f"step_{found[0]:08d}" and (record is None or record["n_steps"] == found[0]),
        f"{files[0].path}: it is of step {found[0]}",
    )
    return found


def read_state(checkpoint: Path, device: torch.device, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
    """The tensors of a state by name, of latents start .. stop - 1 (all if stop is None); written by any number of
    ranks. What is not of latents is as the first of the files has it.

    Raises:
        ValueError: latents that no file has. SafetensorError, OSError: a file that cannot be read.
    """
    files = [file for file in _state_files(checkpoint, checkpoint_record(checkpoint)) if file.overlaps(start, stop)]
    pieces = [_read(file, device, start, stop) for file in files]
    return {name: _joined(name, [piece[name] for piece in pieces]) for name in pieces[0]}


def _read(file: StateFile, device: torch.device, start: int, stop: int | None) -> dict[str, Tensor]:
    stops = [each - file.start for each in (stop, file.stop) if each is not None]
    inside = slice(max(start - file.start, 0), min(stops, default=None))
    tensors = {}
    with safe_open(file.path, framework="pt", device=str(device)) as opened:
        for name in opened.keys():  # noqa: SIM118 it is no dictionary
            values = opened.get_slice(name)
            tensors[name] = values[inside] if _is_of_latents(name, values.get_shape()) else opened.get_tensor(name)
    return tensors


def _is_of_latents(name: str, shape: Sequence[int]) -> bool:
    return len(shape) > 0 and name.partition(".")[0] in _OF_LATENTS


def _joined(name: str, pieces: list[Tensor]) -> Tensor:
    if len(pieces) == 1 or not _is_of_latents(name, pieces[0].shape):
        return pieces[0]
    return torch.cat(pieces)


def _state_files(checkpoint: Path, record: dict[str, Any] | None) -> list[StateFile]:
    if record is None or "shards" not in record:
        return [StateFile(checkpoint / STATE_FILE, 0, None, None)]
    files = [StateFile(checkpoint / s["file"], s["start"], s["stop"], s["sha256"]) for s in record["shards"]]
    ends = [0, *(file.stop for file in files)]
    whole_of_it = len(files) > 0 and all(file.start == end for file, end in zip(files, ends))
    require(whole_of_it, f"{checkpoint / CHECKPOINT_FILE}: its shards do not have all latents, one after the other")
    return files


def _check_digest(path: Path, digest: str) -> None:
    require(path.is_file(), f"{path}: no such file")
    same = sha256_file(path) == digest
    require(same, f"{path}: altered, its SHA-256 is not the one in {CHECKPOINT_FILE}")


def _counts(path: Path) -> tuple[int, int]:
    """Steps and rows, from a file's header."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        return int(header["n_steps"]), int(header["n_rows_seen"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a complete state ({first_line(error)})") from None
