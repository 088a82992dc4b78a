"""What the records of an SAE say of it, as a card or a repository may tell it: without the paths of this machine."""

import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.errors import require
from saevlm_fast.formats.sae_header import SAEHeader, read_sae_header
from saevlm_fast.records import object_of, parse_json
from saevlm_fast.sae import WEIGHTS_FILE
from saevlm_fast.training.checkpoints import METRICS_FILE, RUN_FILE, read_settings

SCORES_FILE = "scores.parquet"
PICTURES = ("picture.png", "latents.png", "top_images.png", "contact_sheet.png")  # the first that is there is shown
_SETTINGS_FILE = "settings.toml"  # of cli/record.py, which stands above
# An absolute path, or one of a home directory, also behind a prefix: hf:/home/me/clip.
_PATH = re.compile(r"(^|(?<=:))(?!//)(?:[/~]|[A-Za-z]:\\)(?:[^:]*[/\\])?")
_HUB_MODEL = re.compile(r"hf:([\w.-]+/[\w.-]+)")
_LONGEST_LOG = 1 << 28


@dataclass(frozen=True)
class Facts:
    """Of an SAE directory.

    Attributes:
        directory: where it is. header: what its cfg.json says.
        source: point, layer, tokens, model, images; {} where nothing is recorded.
        recipe: settings of the training, by name. data: rows it was trained on.
        evaluation: the final one, by SAELens' names without eval/; held_out: whether on other rows, if that is known.
        scores: of the Monosemanticity Score over all latents where it is defined.
        picture: a file in the directory.
    """

    directory: Path
    header: SAEHeader
    source: dict[str, Any]
    recipe: dict[str, Any]
    data: dict[str, Any]
    evaluation: dict[str, float]
    held_out: bool | None
    scores: dict[str, float]
    picture: Path | None

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> "Facts":
        """What is recorded in an SAE directory, a run's or another.

        Raises:
            ValueError: no SAE is there, or a record of it is damaged.
        """
        directory = Path(directory)
        header = read_sae_header(directory)
        metadata = public(header.config.metadata)
        run = read_settings(directory) if (directory / RUN_FILE).is_file() else {}
        return cls(
            directory=directory,
            header=header,
            source=object_of(metadata.get("source")),
            recipe=_recipe(run, header.config) or object_of(metadata.get("training")),
            data=public(object_of(run.get("data"))),
            evaluation=_last_evaluation(directory / METRICS_FILE),
            held_out=_held_out(directory / _SETTINGS_FILE),
            scores=_scores(directory / SCORES_FILE, directory / WEIGHTS_FILE),
            picture=next((directory / name for name in PICTURES if (directory / name).is_file()), None),
        )

    @property
    def model(self) -> str | None:
        """What the activations are of, as `harvest --model` was told: hf:openai/clip-vit-large-patch14."""
        spec = object_of(self.source.get("model")).get("spec") or self.header.config.metadata.get("model")
        return spec if isinstance(spec, str) else None

    @property
    def base_model(self) -> str | None:
        """The Hub's repository of that model, where it is one."""
        found = _HUB_MODEL.fullmatch(self.model or "")
        return found[1] if found and not Path(found[1]).exists() else None

    @property
    def place(self) -> str | None:
        """`residual of layer 11, tokens cls`; None where it is not recorded."""
        metadata = self.header.config.metadata
        point = self.source.get("point") or metadata.get("hook")
        layer = self.source["layer"] if "layer" in self.source else metadata.get("layer")
        tokens = self.source.get("tokens") or metadata.get("tokens")
        if point is None and layer is None:
            return None
        where = str(point or "activations") + ("" if layer is None else f" of layer {layer}")
        return where + ("" if tokens is None else f", tokens {tokens}")


def public(value: Any) -> Any:
    """A record without the folders of this machine: of absolute paths the last name is left, everywhere in it."""
    if isinstance(value, str):
        return _PATH.sub("", value.rstrip("/")) if _PATH.search(value) else value
    if isinstance(value, dict):
        return {key: public(each) for key, each in value.items()}
    return [public(each) for each in value] if isinstance(value, list | tuple) else value


def _recipe(run: dict[str, Any], config: SAEConfig) -> dict[str, Any]:
    """Of a run, the settings that it was made by, also those that were not given; as recorded by another release."""
    recorded = object_of(run.get("train"))
    try:
        return TrainConfig(**{**recorded, "betas": tuple(recorded["betas"])}).used(config)
    except (KeyError, TypeError, ValueError):
        return recorded


def _last_evaluation(path: Path) -> dict[str, float]:
    """The last line of a log that is of an evaluation; {} of a run that was not finished, or of no run."""
    if not path.is_file():
        return {}
    require(path.stat().st_size <= _LONGEST_LOG, f"{path}: longer than a log of ours gets")
    for line in reversed(path.read_bytes().splitlines()):
        record = parse_json(line, path)
        found = {
            name.removeprefix("eval/"): value for name, value in object_of(record).items() if name.startswith("eval/")
        }
        if found:
            return {name: value for name, value in found.items() if isinstance(value, int | float)}
    return {}


def _held_out(path: Path) -> bool | None:
    """Whether the evaluation was of rows that the run was not trained on: the box's, or those of --validation."""
    try:
        train = tomllib.loads(path.read_text(encoding="utf-8"))["train"]
        return "validation" in train or "activations" not in train
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _scores(path: Path, weights: Path) -> dict[str, float]:
    """Of the table of ms-score: defined ones, their mean and the best. {} where there is none, or one of before these
    weights, which a run that was replaced has left."""
    if not path.is_file() or path.stat().st_mtime < weights.stat().st_mtime:
        return {}
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        ms = pq.read_table(path, columns=["ms"])["ms"].cast(pa.float64())
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{path}: no table of scores ({str(error).splitlines()[0]:.120})") from None
    defined = ms.filter(pc.is_finite(ms))
    if not len(defined):
        return {}
    return {
        "defined": len(defined),
        "latents": len(ms),
        "mean": float(pc.mean(defined).as_py()),
        "best": float(pc.max(defined).as_py()),
    }


def compact(value: Any) -> str:
    """A setting or a figure in a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
