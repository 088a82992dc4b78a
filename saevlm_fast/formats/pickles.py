"""Pickles, which can run code when they are read: read as data alone, or not at all.

`torch.load(weights_only=True)` makes tensors, numbers, strings, lists and dicts, and refuses every other name. Some
libraries pickle an object of settings beside their tensors. Such a name is read as an empty class of ours that keeps
what it is given: the settings can be read, and nothing of the library, nor of the file, is run. That is done for names
known to be settings, and for names that the user trusts.
"""

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saevlm_fast.errors import first_line, require

# Classes of settings that libraries pickle.
SETTINGS_CLASSES = (
    "vit_prisma.sae.config.VisionModelSAERunnerConfig",
    "src.sae_training.config.ViTSAERunnerConfig",
    "sae_training.config.ViTSAERunnerConfig",
)
_MOST_NAMES = 100  # a pickle of settings has one or two
_REFUSED_NAME = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)")
ADVICE = (
    "save it again where its library is installed, as a plain state dict: "
    "torch.save({name: tensor, ...}, 'sae.pt'), or with safetensors"
)


class Stub:
    """Stands for a class of a file: keeps arguments and attributes, and does nothing."""

    def __init__(self, *arguments: Any, **named: Any):
        self.arguments = arguments
        self.__dict__.update(named)


def load_pickle(path: Path, trust: bool | Sequence[str] = False, skip: int = 0) -> Any:
    """What a file of torch.save holds, its tensors on the CPU, mapped where the file allows it.

    Args:
        path: of the file.
        trust: names of classes that are read as `Stub` beside SETTINGS_CLASSES; True: whatever names there are.
        skip: bytes before it begins.

    Raises:
        ValueError: no file of torch.save, a truncated one, or one that needs names that are not trusted.
    """
    data = None
    if skip:
        with open(path, "rb") as file:
            file.seek(skip)
            data = io.BytesIO(file.read())
    zipped = zipfile.is_zipfile(data or path)
    if zipped:
        _check_stored(data or path, path)
    allowed = [*SETTINGS_CLASSES, *([] if isinstance(trust, bool) else trust)]
    for _ in range(_MOST_NAMES):
        stubs: list[Any] = [(type(name.rpartition(".")[2], (Stub,), {}), name) for name in dict.fromkeys(allowed)]
        try:
            with torch.serialization.safe_globals(stubs), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of protocols that the reader "might not support"
                if data is None:
                    return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
                data.seek(0)
                return torch.load(data, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            name = _name_in(error)
            require(name is not None, f"{path}: not a file of tensors ({_reason(error)}); {ADVICE}")
            never = f"{path}: a pickle that needs {name}, which is read from no file, not even as data; {ADVICE}"
            require(name not in allowed, never)
            message = f"{path}: a pickle that needs {name}, which is not read from untrusted files; {ADVICE}"
            require(trust is True, f"{message}; or name it: --trust-pickle {name} (it is read as data, not run)")
            allowed.append(str(name))
        except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{path}: not a complete file of torch.save ({first_line(error)})") from None
    raise ValueError(f"{path}: a pickle that needs more than {_MOST_NAMES} names; {ADVICE}")


def _name_in(error: BaseException) -> str | None:
    found = _REFUSED_NAME.search(str(error))
    return None if found is None else found[1]


def _reason(error: BaseException) -> str:
    """What the reader of tensors says, without torch's advice to read the file as code."""
    return first_line(ValueError(str(error).rpartition("WeightsUnpickler error:")[2]))


def _check_stored(file: Path | io.BytesIO, path: Path) -> None:
    """torch.save compresses nothing: what is compressed can be larger than any memory."""
    with zipfile.ZipFile(file) as archive:
        packed = next((each for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED), None)
    name = None if packed is None else packed.filename
    require(packed is None, f"{path}: {name} is compressed; files of torch.save are not")


def state_dict(value: Any, path: Path, *inside: str) -> dict[str, Any]:
    """The dict of tensors of a loaded file, under the first of the keys `inside` that is there, or itself.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, dict):
        value = next((value[key] for key in inside if isinstance(value.get(key), dict)), value)
    require(isinstance(value, dict), f"{path}: holds a {type(value).__name__}, no dict of tensors")
    return dict(value)
