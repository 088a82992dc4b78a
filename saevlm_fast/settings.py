"""One declaration of a setting: a dataclass field with its help text, its paper value and its limits.

    @dataclass(frozen=True)
    class TrainConfig(Settings):
        steps: int = setting(110_000, help="Optimiser steps.", paper="110,000", at_least=1)

From the field come the Python default, the check when an object is made, the option of the command line and the key of
a configuration file (saevlm_fast/cli/command_line.py, config_file.py), and the line in docs/settings.md
(saevlm_fast/cli/reference.py). Choices are the annotation's: `Literal["topk", "batch_topk"]`. Another class takes a
field over with `same_as`.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from inspect import get_annotations
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from saevlm_fast.errors import check_kind, require, shown
from saevlm_fast.urls import is_url, redacted_text, remote_path

_KEY = "setting"
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, in the file systems that people have
NUMBERS: dict[Any, tuple[str, Any]] = {  # kind -> its name, what is accepted for it
    bool: ("true or false", bool),
    int: ("a whole number", Integral),
    float: ("a number", Real),
}
S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Setting:
    """What is known of a setting beside its name, kind and default.

    Attributes:
        help: what it means, in a sentence.
        shown: the default in words, where it is none that can be printed.
        paper: what arXiv 2504.02821 uses.
        at_least, above, below, at_most: limits of a number. must: what it must be, where these are more than one limit.
        spec: format of the number in messages.
        parse: (name, text) -> value, of kinds that a command line cannot say by itself.
        option: name on the command line and in a file, where that is not the field's.
        positional: given by its place. on_command_line, in_file: where it can be given.
        recorded: written into settings.toml. Not what says how a call is made, as resume.
        swept: several values, separated by commas, make several results of one run. tables: of that, tables of a file.
        repeats: of a list whose items are of those of another, or have places: one may come again.
        instead_of: names of what it excludes; given on the command line, it replaces them in a file.
        remote: a path that may be a URL (urls.py).
        place: what a text may name on this machine, and how (cli/from_anywhere.py).
    """

    help: str
    shown: str | None = None
    paper: str | None = None
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    must: str | None = None
    spec: str = ""
    parse: Callable[[str, str], Any] | None = None
    option: str | None = None
    positional: bool = False
    on_command_line: bool = True
    in_file: bool = True
    recorded: bool = True
    swept: bool = False
    tables: bool = False
    repeats: bool = False
    instead_of: tuple[str, ...] = ()
    remote: bool = False
    place: Literal["path", "table", "images", "model", "assumption"] | None = None

    def allows(self, value: float) -> bool:
        """Whether a number is within the limits; NaN is within none."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    @property
    def limits(self) -> str:
        """What a number must be, in words: "at least 1"; "" if it may be any."""
        if self.must is not None:
            return self.must
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least:g} and {self.at_most:g}"
        if self.at_least is not None:
            return "not negative" if self.at_least == 0 else f"at least {self.at_least:g}"
        if self.above is not None:
            return "positive" if self.above == 0 else f"above {self.above:g}"
        return ""


class Several(tuple[Any, ...]):
    """Values of one setting, of a run that has several results."""


def setting(default: Any = MISSING, *, help: str, factory: Any = None, **more: Any) -> Any:
    """A dataclass field; more: attributes of Setting. Without a default (or its factory) it must be given."""
    metadata = {_KEY: Setting(help, **more)}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


def same_as(cls: type, name: str, default: Any = ..., **changes: Any) -> Any:
    """The field of another class, its default and what is known of it; both may be changed."""
    origin = _fields(cls)[name]
    if default is ...:
        default = origin.default
    return field(default=default, metadata={_KEY: replace(origin.metadata[_KEY], **changes)})


@dataclass(frozen=True)
class Settings:
    """A class of settings: checked when an object is made.

    Raises:
        ValueError: "steps: 0 must be at least 1", with the field's name, its value and its limit.
    """

    title: ClassVar[str]  # of a class's own settings, where they are listed
    removed: ClassVar[Mapping[str, Any]] = {}  # settings that older files have -> the only value that is left of each

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Every value alone. Classes whose values must also go together add that to it."""
        cls: Any = type(self)
        for name, known in settings_of(cls).items():
            value, choices = getattr(self, name), choices_of(cls, name)
            if isinstance(value, str) and known.parse is not None:  # as on the command line: lr="auto"
                value = known.parse(name, value)
                object.__setattr__(self, name, value)
            if value is None:
                require(name in _optional(cls), f"{name}: is None; it needs a value")
                continue
            kind = kinds_of(cls)[name]
            if kind is Path:
                value = path_of(name, value)
                object.__setattr__(self, name, value)
                _check_here(name, known, value)
            elif kind in NUMBERS:
                what, accepted = NUMBERS[kind]
                fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
                require(fits, f"{name}: {shown(value)} is not {what}")
                if not isinstance(value, int | float):  # NumPy's own
                    value = kind(value)
                    object.__setattr__(self, name, value)
            elif kind is str:
                if type(value).__name__ == "device":  # torch's, which is not imported for that
                    value = str(value)
                    object.__setattr__(self, name, value)
                check_kind(name, value, str, "a text")
            elif get_origin(kind) is tuple:
                object.__setattr__(self, name, _plain(name, several(name, value), get_args(kind)[0]))
                if not (known.repeats or known.tables):
                    check_once(known.option or name, getattr(self, name))
                for each in getattr(self, name) if get_args(kind)[0] is Path else ():
                    _check_here(name, known, each)
            for each in value if isinstance(value, tuple) else (value,):
                if known.place == "path" and isinstance(each, str):
                    _check_length(known.option or name, each)
            if kind is Path or kind is bool:
                continue
            if choices:
                plain = isinstance(value, str | int)  # not what compares elementwise
                listed = ", ".join(map(str, choices))
                require(plain and value in choices, f"{known.option or name}: {shown(value)} is not one of {listed}")
            elif isinstance(value, int | float):
                require(not isinstance(value, int) or value < 2**62, f"{name}: {value} must be below 2^62")
                must = f"must be {known.limits}".replace("be not", "not be")
                require(known.allows(value), f"{name}: {value:{known.spec}} {must}")

    @classmethod
    def without_removed(cls, values: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
        """`values` of a file of before, less the settings that are gone.

        Raises:
            ValueError: "FILE: dtype: 'tf32' is gone, 'float32' is all there is; ...".
        """
        for name in cls.removed.keys() & values.keys():
            left = cls.removed[name]
            require(
                values[name] == left,
                f"{where}: {name}: {values[name]!r} is gone, {left!r} is all there is; train anew (--force)",
            )
        return {name: value for name, value in values.items() if name not in cls.removed}

    def part(self, cls: type[S], **more: Any) -> S:
        """An object of a class whose fields these settings have; more: values of fields that they lack, or replace."""
        mine: Any = type(self)
        other: Any = cls
        names = [name for name in settings_of(other) if name in settings_of(mine)]
        return cls(**{name: getattr(self, name) for name in names} | more)


@cache
def _fields(cls: Any) -> dict[str, Field[Any]]:
    return {each.name: each for each in fields(cls)}


@cache
def settings_of(cls: Any) -> dict[str, Setting]:
    """What is known of every setting of a class, in the order of its fields."""
    return {name: each.metadata[_KEY] for name, each in _fields(cls).items() if _KEY in each.metadata}


@cache
def kinds_of(cls: Any) -> dict[str, Any]:
    """The annotation of every field, without `| None`."""
    return {name: _without_none(kind) for name, kind in get_type_hints(cls).items() if name in _fields(cls)}


@cache
def _optional(cls: Any) -> frozenset[str]:
    """The fields that may be None."""
    kinds = get_type_hints(cls).items()
    return frozenset(name for name, kind in kinds if type(None) in get_args(kind) or kind is Any)


def several(name: str, value: Any) -> tuple[Any, ...]:
    """The values of a list, tuple or array, in an order that was meant: not those of a set. ValueError: no such."""
    try:
        values = None if isinstance(value, str | bytes | Mapping | Set) else tuple(value)
    except TypeError:  # also of an array of no dimension, which says that it can be iterated
        values = None
    require(values is not None, f"{name}: {shown(value)} is not a list, tuple or array")
    return values or ()


def check_once(name: str, values: tuple[Any, ...]) -> None:
    """ValueError: one of a list's values stands in it twice. That is a slip, and nobody can say which was meant."""
    try:
        n_different = len(set(values))
    except TypeError:  # a list in the list, which is refused as no value of it
        return
    if n_different < len(values):
        twice = next(value for i, value in enumerate(values) if value in values[:i])
        said = str(twice) if isinstance(twice, os.PathLike) else getattr(twice, "name", twice)
        raise ValueError(f"{name}: {redacted_text(str(said))} is listed twice")


def _plain(name: str, values: tuple[Any, ...], kind: Any) -> tuple[Any, ...]:
    """Python's own numbers, where numbers are meant."""
    if kind not in (int, float):
        return values
    what, accepted = NUMBERS[kind]
    bad = [value for value in values if not isinstance(value, accepted) or isinstance(value, bool)]
    require(not bad, f"{name}: {shown(bad[0]) if bad else None} is not {what}")
    return tuple(value if isinstance(value, int | float) else kind(value) for value in values)


def _check_here(name: str, known: Setting, path: Any) -> None:
    """ValueError: a URL where only a path on this machine will do."""
    here = known.remote or not is_url(path)
    require(here, f"{name}: {path} is elsewhere; a path on this machine is needed")


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    return kind


def choices_of(cls: type, name: str) -> tuple[Any, ...]:
    """The values of a `Literal` annotation; () of any other."""
    kind = kinds_of(cls)[name]
    return get_args(kind) if get_origin(kind) is Literal else ()


def declared_by(cls: Any, name: str) -> Any:
    """The class that a setting comes from: the furthest base that has it."""
    return [base for base in cls.__mro__ if name in get_annotations(base)][-1]


def title_of(cls: Any, name: str) -> str:
    """Under which a setting is listed: that of the class that it comes from."""
    return str(vars(declared_by(cls, name)).get("title", "Options"))


def default_of(cls: type, name: str) -> Any:
    """The Python default; MISSING if there is none."""
    return _fields(cls)[name].default


# Text to values, as a command line or a file gives them ---------------------------------------------------------------


class Listed(str):
    """Texts with commas between them, as on a command line, of which each is known, as a file's list has them."""

    parts: tuple[str, ...]

    def __new__(cls, parts: Iterable[str]) -> Self:
        parts = tuple(parts)
        listed = super().__new__(cls, ",".join(parts))
        listed.parts = parts
        return listed


def path_of(name: str, text: Any) -> Path:
    """A path, or a URL as one. ValueError: it is empty, which is not the working directory, or holds a NUL."""
    check_kind(name, text, (str, os.PathLike), "a path")
    path = os.fspath(text)
    require(path != "", f"{name}: is empty; . is the working directory")
    require("\0" not in path, f"{name}: {path!r} holds a NUL")
    if is_url(text):
        return remote_path(text)
    _check_length(name, str(path))
    return Path(path)


def _check_length(name: str, path: str) -> None:
    """ValueError: no file system that people have takes such a path."""
    encoded = os.fsencode(path)
    whole, longest = len(encoded), max(map(len, encoded.split(os.fsencode(os.sep))))
    require(
        whole <= _LONGEST_PATH and longest <= _LONGEST_NAME,
        f"{name}: {path[:40]}... is too long: {whole:,} bytes, and {longest:,} in one name; a path may have "
        f"{_LONGEST_PATH:,}, and a name {_LONGEST_NAME}",
    )


def integer(name: str, text: str) -> int:
    """A whole number. ValueError: "layer: 'x' is not a whole number"."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r:.60} is not a whole number") from None


def number(name: str, text: str) -> float:
    """A number. ValueError: "lr: 'x' is not a number"."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r:.60} is not a number") from None


READERS: dict[Any, Callable[[str, str], Any]] = {int: integer, float: number}  # kind -> (name, text) -> value


def several_of(key: str, parts: Sequence[Any], read: Callable[[Any], Any]) -> Several:
    """The values of a list, each once. ValueError: one that is twice in it."""
    values = Several(read(part) for part in parts)
    check_once(key, values)
    return values


def texts(name: str, text: str) -> tuple[str, ...]:
    """Texts separated by commas; those of a list may have commas themselves."""
    return tuple(part.strip() for part in (text.parts if isinstance(text, Listed) else text.split(",")))


def integers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    return tuple(integer(name, part) for part in texts(name, text))


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    return tuple(number(name, part) for part in texts(name, text))


def paths(name: str, text: str) -> tuple[Path, ...]:
    """Paths separated by commas; a text that is a path as it stands is one, commas and all."""
    parts = text.parts if isinstance(text, Listed) else [text] if os.path.exists(text) else text.split(",")
    return tuple(path_of(name, part) for part in parts)


def number_or_auto(name: str, text: str) -> float | None:
    """A number, or auto, which is None."""
    return None if text == "auto" else number(name, text)
