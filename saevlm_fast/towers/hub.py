"""Where a model's files come from: the box, a directory, the hub's cache, the hub; and what is said on the way."""

import json
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from saevlm_fast.box.models import MODELS, model_directory
from saevlm_fast.errors import Interrupted, first_line, require

OFFLINE = {
    "hf": "hf:DIR, a directory with config.json, model.safetensors and preprocessor_config.json",
    "open_clip": "open_clip:ARCH/FILE.safetensors, or open_clip:local-dir:DIR, a directory with open_clip_config.json "
    "and open_clip_model.safetensors",
    "timm": "timm:NAME:FILE.safetensors",
}
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
_PACKAGES = {"open_clip": "open_clip_torch"}
_CONNECT_SECONDS = 5
Loaded = TypeVar("Loaded")


@contextmanager
def one_line_errors(spec: str) -> Iterator[None]:
    """The libraries' own errors, which are of many kinds and several lines, as ValueErrors of one line."""
    try:
        yield
    except ValueError as error:
        message = first_line(error, longest=1000)  # this package's own say what files would do instead
        raise ValueError(message if spec in message else f"{spec}: {message}") from error
    except Exception as error:  # of many kinds, some of the libraries' own
        if not is_foreign(error):
            raise
        raise ValueError(f"{spec}: {foreign_message(error)}") from error


def is_foreign(error: BaseException) -> bool:
    """Whether an error says that a library and a model, a processor or a template do not fit; not that memory ran out,
    or that the user wants to stop."""
    no_memory = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))
    return not no_memory and not isinstance(error, Interrupted)


def foreign_message(error: BaseException) -> str:
    """What a library's error says, in one line, for a user who cannot change how the library is called."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        missing = error.name.partition(".")[0]
        return f"needs the package {_PACKAGES.get(missing, missing)}, which is not installed"
    if "weights_only" in str(error):  # torch's advice is an argument that this package never changes
        return _UNREAD_ARCHIVE if "TorchScript" in str(error) else _UNREAD_PICKLE
    if isinstance(error, SafetensorError):
        return f"its weights file is cut off, damaged or no safetensors file ({first_line(error)})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]  # torch puts the reason second
    told = isinstance(error, (OSError, RuntimeError, ImportError, pickle.UnpicklingError))
    kind = "" if told and lines else type(error).__name__
    return ": ".join(part for part in (kind, " ".join(lines[:2])[:300]) if part)


_UNREAD_PICKLE = (
    "its weights file pickles more than tensors, which could run any code, so it is not read; save the state_dict() "
    "alone, as .safetensors"
)
_UNREAD_ARCHIVE = (
    "its weights file is a TorchScript archive, which could run any code, so it is not read; save the model's "
    "state_dict() as .safetensors"
)


def local_or_hub(
    name: str, spec: str, load: Callable[[str, bool], Loaded], on_message: Callable[[str], None]
) -> Loaded:
    """load(NAME_OR_DIR, whether from local files alone): a model of the box, a directory, the hub's cache, the hub.

    The box first: a directory that happens to be called tiny-clip is ./tiny-clip.

    Raises:
        ValueError: no such directory, or one without config.json.
    """
    if name in MODELS:
        return load(str(model_directory(name)), True)
    if Path(name).is_dir():
        of_open_clip = (Path(name) / "open_clip_config.json").is_file()
        instead = f"; it is of open_clip, give open_clip:local-dir:{name}" if of_open_clip else ""
        require((Path(name) / "config.json").is_file(), f"{spec}: {Path(name) / 'config.json'} is missing{instead}")
        return load(name, True)
    require(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None, f"{spec}: no directory {name}")
    try:
        return load(name, True)
    except OSError:  # something is not in the cache
        announce_download(spec, on_message)
    return load(name, False)


def announce_download(spec: str, on_message: Callable[[str], None]) -> None:
    """Says that a download begins; ValueError at once if the hub does not answer (the libraries retry for minutes)."""
    from huggingface_hub import constants, get_session

    on_message(f"{spec}: not on this machine, downloading from {constants.ENDPOINT} to {constants.HF_HUB_CACHE}")
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_SECONDS)
    except Exception as error:  # which HTTP library, with exceptions of its own, depends on the hub's version
        layout = OFFLINE[spec.partition(":")[0]]
        raise ValueError(
            f"{spec}: not on this machine, and {constants.ENDPOINT} does not answer ({first_line(error)}); offline, "
            f"give {layout}"
        ) from error


def cached_file(repo: str, names: Sequence[str]) -> str | None:
    """The first of these files of a hub repository that is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(repo, name) for name in names)
    return next((path for path in paths if isinstance(path, str)), None)


def weight_names(source: str) -> set[str]:
    """Names in the .safetensors files of a checkpoint that has been loaded; none of one in other files."""
    from safetensors import safe_open

    if (single := _loaded_file(source, "model.safetensors")) is not None:
        with safe_open(single, framework="pt") as weights:
            return set(weights.keys())
    if (index := _loaded_file(source, "model.safetensors.index.json")) is not None:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return set()


def _loaded_file(source: str, name: str) -> Path | None:
    """Of a directory, or in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        found = Path(source) / name
        return found if found.is_file() else None
    cached = try_to_load_from_cache(source, name)
    return Path(cached) if isinstance(cached, str) else None
