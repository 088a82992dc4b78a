"""What is at a path, read no further than it is asked for: names of files, then small files, then tensors.

Every reader of this room takes a `Source`, and finds in it also what the user says where files say nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saevlm_fast.errors import did_you_mean, first_line, require
from saevlm_fast.formats.pickles import load_pickle
from saevlm_fast.records import parse_json

ASSUMPTIONS = {
    "format": "name of the format, where names of files and tensors do not tell it",
    "k": "latents of a row",
    "threshold": "of the activation, one number for all latents",
    "activation": "relu, topk, jumprelu or batch_topk",
    "input_mean": "what was subtracted from inputs: a number, or a file (.npy, .safetensors, .pt) of [d_in]",
    "input_std": "what inputs were divided by, after input_mean was subtracted: a number",
}
_SMALL = 1 << 26  # bytes of a JSON or YAML file
_REPEATED = 1 << 24  # numbers of a tensor of which the file may hold fewer, as of one threshold expanded to all latents
_MOST_K = 1 << 31
_JSON, _YAML = (".json",), (".yaml", ".yml")
NOT_SAFETENSORS = (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError)
T = TypeVar("T")


class Source:
    """A folder of files, or one file of it beside the folder's JSON and YAML files.

    Attributes:
        path: as it was given. folder: itself, or that of the file. file: the name of the file, None of a folder.
        names: of the files that a reader may open, sorted.
        opened: of those that were opened for what they hold; they make the SAE what it is.

    Raises:
        ValueError: nothing is there; an assumption of an unknown name.
    """

    def __init__(
        self,
        path: str | Path,
        trust_pickle: bool | Sequence[str] = False,
        assume: Mapping[str, Any] | None = None,
    ):
        self.path = Path(path)
        self.trust_pickle, self.assume = trust_pickle, dict(assume or {})
        require(self.path.exists(), f"{path}: no such file or folder")
        for key in self.assume:
            known = f"{', '.join(ASSUMPTIONS)}{did_you_mean(key, ASSUMPTIONS)}"
            require(key in ASSUMPTIONS, f"assume: {key!r} is not one of {known}")
        single = self.path.is_file() and self.path.suffix not in (*_JSON, *_YAML)
        self.folder = self.path.parent if self.path.is_file() else self.path
        self.file = self.path.name if single else None
        names = sorted(each.name for each in self.folder.iterdir() if each.is_file())
        small = (*_JSON, *_YAML)
        self.names = tuple(name for name in names if not single or name == self.file or Path(name).suffix in small)
        self.opened: set[str] = set()
        self._used: set[str] = set()
        self._loaded: dict[str, Any] = {}

    def has(self, *names: str) -> bool:
        """Whether all of these files are there."""
        return all(name in self.names for name in names)

    def at(self, name: str) -> Path:
        """The path of a file, for messages and for reading."""
        return self.folder / name

    def only(self, *suffixes: str) -> str | None:
        """The name of the file with one of these suffixes, where there is exactly one (what the user named, first)."""
        if self.file is not None and self.file.endswith(suffixes):
            return self.file
        found = [name for name in self.names if name.endswith(suffixes)]
        return found[0] if len(found) == 1 else None

    def start(self, name: str, n_bytes: int = 8) -> bytes:
        """The first bytes of a file."""
        with open(self.at(name), "rb") as file:
            return file.read(n_bytes)

    # Small files ------------------------------------------------------------------------------------------------------

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file, which may be "../config.json"; None where there is none.

        Raises:
            ValueError: it is no JSON, no object, or larger than 64 MiB.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        if name not in self._loaded:
            value = parse_json(self._text(path), path)
            require(isinstance(value, dict), f"{path}: it holds no JSON object")
            self._loaded[name] = value
        self.opened.add(name)
        return dict(self._loaded[name])

    def _text(self, path: Path) -> bytes:
        n_bytes = path.stat().st_size
        require(n_bytes <= _SMALL, f"{path}: {n_bytes} bytes; at most {_SMALL} are read of a settings file")
        return path.read_bytes()

    # Tensors ----------------------------------------------------------------------------------------------------------

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors of a file, from the header of safetensors, or a mapped state dict.

        Raises:
            ValueError: a file that holds no dict of tensors.
        """
        if name.endswith(".safetensors"):
            return self._safetensors(name, lambda file, each: tuple(file.get_slice(each).get_shape()))
        state = self.load(name)
        require(isinstance(state, dict), f"{self.at(name)}: holds a {type(state).__name__}, no dict of tensors")
        return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}

    def tensor(self, name: str, tensor: str) -> Tensor:
        """One tensor of a safetensors file."""
        self.opened.add(name)
        return self._safetensors(name, lambda file, each: file.get_tensor(each), only=tensor)[tensor]

    def dtype(self, name: str, tensor: str) -> str:
        """Of one tensor of a safetensors file: "float32"."""
        slices = self._safetensors(name, lambda file, each: file.get_slice(each)[:0].dtype, only=tensor)
        return str(slices[tensor]).removeprefix("torch.")

    def header_metadata(self, name: str) -> dict[str, str]:
        """The text entries in the header of a safetensors file. ValueError: it is not complete."""
        try:
            with safe_open(self.at(name), framework="pt") as file:
                return dict(file.metadata() or {})
        except NOT_SAFETENSORS as error:
            raise ValueError(f"{self.at(name)}: not a complete safetensors file ({first_line(error)})") from None

    def load(self, name: str, skip: int = 0) -> Any:
        """What a file holds: name -> tensor of safetensors, anything of a .pt (by weights_only; see pickles.py).

        skip: bytes before the .pt begins.
        """
        if name not in self._loaded:
            if name.endswith(".safetensors"):
                self._loaded[name] = self._safetensors(name, lambda file, each: file.get_tensor(each))
            else:
                self._loaded[name] = load_pickle(self.at(name), self.trust_pickle, skip)
        self.opened.add(name)
        return self._loaded[name]

    def _safetensors(self, name: str, read: Callable[[Any, str], T], only: str | None = None) -> dict[str, T]:
        try:
            with safe_open(self.at(name), framework="pt") as file:
                names = list(file.keys()) if only is None else [only]
                return {each: read(file, each) for each in names}
        except NOT_SAFETENSORS as error:
            raise ValueError(f"{self.at(name)}: not a complete safetensors file ({first_line(error)})") from None

    # What the user says -----------------------------------------------------------------------------------------------

    def says(self, *keys: str) -> bool:
        """Whether the user says any of these, without using it."""
        return any(key in self.assume for key in keys)

    def assumed(self, key: str) -> Any:
        """What the user says of a key of ASSUMPTIONS; None if nothing. It counts as used."""
        self._used.add(key)
        return self.assume.get(key)

    def assumed_number(self, key: str) -> float | None:
        """The same, as a finite number. ValueError: it is none."""
        value = self.assumed(key)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        require(-float("inf") < number < float("inf"), f"assume: {key} is {value!r}, not a number")
        return number

    def assumed_k(self) -> int | None:
        """k, as a whole number above 0. ValueError: it is none."""
        number = self.assumed_number("k")
        if number is None:
            return None
        require(number == int(number), f"assume: k is {number:g}, not a whole number")
        require(1 <= number <= _MOST_K, f"assume: k is {number:g}, not between 1 and {_MOST_K}")
        return int(number)

    def unused(self) -> list[str]:
        """What the user says and no reader asked for."""
        return sorted(self.assume.keys() - self._used - {"format"})


def floats(tensors: Mapping[str, Any], where: Path, **shapes: tuple[int | str, ...]) -> dict[str, Tensor]:
    """Named tensors after checks: floats(state, path, W_enc=("d_in", "d_sae"), b_dec=("d_in",)).

    A letter or word in a shape stands for a size, one and the same wherever it stands. Names with dots are given as
    **{"encoder.weight": ("d_sae", "d_in")}. Copies, so that a mapped file may change and tensors share no memory.

    Raises:
        ValueError: a tensor that is missing, no dense floating-point tensor of at least 16 bits, of another shape, that
            holds NaN or inf, or far more numbers than the file; with its name and the file's.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        require(name in tensors, f"{where}: tensor {name!r} is missing (found {', '.join(sorted(map(str, tensors)))})")
        tensor = tensors[name]
        require(isinstance(tensor, Tensor), f"{where}: {name} is a {type(tensor).__name__}, no tensor")
        is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        require(is_dense, f"{where}: {name} is sparse, nested or without numbers")
        found = tuple(tensor.shape)
        text = f"{where}: {name} has shape {found}, expected {_shape_text(shape, sizes)}"
        require(len(found) == len(shape), text)
        for size, expected in zip(found, shape):
            expected = sizes.setdefault(expected, size) if isinstance(expected, str) else expected
            require(size == expected, text)
        require(tensor.is_floating_point(), f"{where}: {name} is {tensor.dtype}, not floating point")
        require(tensor.dtype.itemsize > 1, f"{where}: {name} is {tensor.dtype}; at least 16 bits are needed")
        _check_stored(tensor, f"{where}: {name}")
        require(bool(tensor.isfinite().all()), f"{where}: {name} holds NaN or inf")
    return {name: tensors[name].detach().clone(memory_format=torch.contiguous_format) for name in shapes}


def _check_stored(tensor: Tensor, what: str) -> None:
    """ValueError: a file of a few bytes that asks for much memory, one number of which stands for many."""
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    fits = tensor.numel() <= max(stored, _REPEATED)
    require(fits, f"{what} has {tensor.numel():,} numbers, of which the file holds {stored:,}")


def _shape_text(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> str:
    parts = [f"{each}" if isinstance(each, int) else f"{sizes.get(each, each)}" for each in shape]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
