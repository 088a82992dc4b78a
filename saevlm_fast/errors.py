"""How this package refuses: one exception a kind of fault, one way to raise it, and one line of somebody else's error.

Every message names the argument (or the file), its value and the limit, in one line.
"""

import errno
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

# What calls us in a thread, or waits for one; and what decorators of ours are made of.
_OF_THREADS = ("asyncio", "concurrent", "multiprocessing", "queue", "selectors", "threading", "weakref")
_NOT_THE_USERS = (__name__.partition(".")[0], "contextlib", "functools", "torch", *_OF_THREADS)


class ActivationError(ValueError):
    """Activations or codes that cannot be used; the message names the file, the value and the limit."""


class ImageError(ValueError):
    """An image that cannot be used. The message is the reason in one line, without the image's id."""


class Doubt(UserWarning):
    """What stops nothing and is shown once: what files of an SAE do not say and was assumed, a logger that failed."""


class Line(NamedTuple):
    """A line of a program, as warnings know it."""

    file: str
    number: int
    module: str
    registry: dict[Any, Any]


def users_line() -> Line:
    """The line outside this package that led here: the user's, which can do something about it.

    In a thread that a pool has begun, whoever's that is, it is the main thread's: where it is waited for.
    """
    frame = _first_of_user(sys._getframe(1)) or _first_of_user(_main_threads()) or sys._getframe(1)
    module = frame.f_globals.get("__name__") or "<string>"
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    return Line(frame.f_code.co_filename, frame.f_lineno, module, registry)


def _main_threads() -> FrameType | None:
    """Its frame. Never to be kept in a name of that frame: the circle would keep what all callers hold."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _first_of_user(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame = frame.f_back
    return frame


def doubt(text: str, kind: type[Warning] = Doubt, line: Line | None = None) -> None:
    """Warns of it, at the user's line, or at one that was the user's before."""
    file, number, module, registry = line or users_line()
    warnings.warn_explicit(text, kind, file, number, module, registry)


class Interrupted(BaseException):
    """Long work was asked to stop and did so at a point from which it can go on; the message says how.

    As KeyboardInterrupt, it is no Exception: whoever takes any error of a library for a damaged file, or tries again
    after one, is not asked.
    """


@contextmanager
def goes_on(how: str = "the same command goes on where it stopped") -> Iterator[None]:
    """Work that is interrupted says how it goes on. Raises Interrupted."""
    try:
        yield
    except Interrupted as error:
        raise Interrupted(f"{str(error).partition(';')[0]}; {how}") from None


class DiskFull(OSError):
    """A file for which there is no room; whatever writes it, the message says the same in the same order.

    Attributes: of an OSError; what: was being written; kept: of the work, and how it goes on; free: bytes on its disk
    when it failed, None if the system does not say.
    """

    what, kept = "this file", "what was there before is as it was"
    free: int | None = None

    def __str__(self) -> str:
        free_text = "" if self.free is None else f"; {size_text(self.free)} are free on its disk"
        return f"{self.filename}: {self.strerror}, while {self.what} was written{free_text}; {self.kept}"


@contextmanager
def while_writing(what: str, kept: str = "", path: Path | None = None) -> Iterator[None]:
    """Work that writes says what, and what is kept of it if the disk is full. Raises DiskFull.

    path: of the file, where an error would not have its name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and path is not None:
            error.filename = path
        full = full_disk(error)
        if not isinstance(full, DiskFull):
            raise
        for name, value in (("what", what), ("kept", kept)):
            if value and name not in vars(full):  # else who was nearer to the file has said it
                setattr(full, name, value)
        if full is error:
            raise
        raise full from error


def full_disk(error: OSError) -> OSError:
    """The error as DiskFull, if it is of a disk without room for a file whose name it tells."""
    if isinstance(error, DiskFull) or error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename is None:
        return error
    full = DiskFull(error.errno, error.strerror, str(error.filename))
    full.free = _free_room(full.filename)
    return full


def _free_room(path: str) -> int | None:
    """Bytes, where the file is or would be; None if the system does not say."""
    try:
        there = next(each for each in (Path(path).absolute(), *Path(path).absolute().parents) if each.exists())
        return shutil.disk_usage(there).free
    except OSError:
        return None


def require(condition: bool, message: str, error: type[ValueError] = ValueError) -> None:
    """Raise error(message) unless the condition holds."""
    if not condition:
        raise error(message)


@contextmanager
def renamed(argument: str, *names: str) -> Iterator[None]:
    """A ValueError of an argument that is called one of `names`, or of none, is of `argument`, as the user gave it."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name in names:
            message = message.removeprefix(f"{name}: ")
        raise ValueError(message if message.startswith(f"{argument}: ") else f"{argument}: {message}") from error


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """ValueError: the value is of none of the kinds: "sae: 'x' is not a SparseAutoencoder". For public arguments."""
    if not isinstance(value, kinds):  # only then: the repr of a tensor on a GPU takes milliseconds
        raise ValueError(f"{name}: {shown(value)} is not {wanted}")


def check_dense(name: str, tensor: Any, error: type[ValueError] = ValueError) -> None:
    """error: a tensor that is sparse, nested or packed for a library. To be asked before its shape."""
    layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    masked = type(tensor).__name__ == "MaskedTensor"  # of torch.masked, whose mask would be lost
    require(not masked, f"{name}: a MaskedTensor, must be dense; give the rows that are not masked", error)
    require(layout == "strided", f"{name}: a tensor of layout {layout}, must be dense", error)


def shown(value: object) -> str:
    """A value as messages have it: its repr in one line, 60 characters at most."""
    return f"{' '.join(repr(value).split()):.60}"


def whole_number(name: str, value: object, at_least: int = 1) -> int:
    """The value as Python's int. ValueError: another kind (true and false too), below the limit or 2^62 and more."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    require(whole, f"{name}: {shown(value)} is not a whole number")
    number = int(value)  # type: ignore[call-overload]
    limit = "not be negative" if at_least == 0 else f"be at least {at_least}"
    require(number >= at_least, f"{name}: {number} must {limit}")
    require(number < 2**62, f"{name}: {number} must be below 2^62")
    return number


def real_number(name: str, value: object) -> float:
    """The value as Python's float: of a number, also NumPy's, or a tensor or array of one. ValueError: it is none."""
    single: Any = value
    if getattr(value, "shape", None) == ():
        single = single.item()
    require(isinstance(single, Real) and not isinstance(single, bool), f"{name}: {shown(value)} is not a number")
    try:
        return float(single)
    except OverflowError:
        raise ValueError(f"{name}: {shown(value)} is beyond float64") from None


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of an error's message, `longest` characters at most; its kind's name where it has none."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:longest]


class OtherSettings(ValueError):
    """A run was started with other settings than are asked for.

    differ: of each its section, its name, the value asked for, and the one before.
    """

    def __init__(self, differ: Sequence[tuple[str, str, Any, Any]]):
        self.differ = differ
        super().__init__(self.told(lambda section, name: name))

    def told(self, called: Callable[[str, str], str]) -> str:
        """The message; called: what a setting of a section and a name is called in it."""
        differ = [(section, name, *_apart(value, before)) for section, name, value, before in self.differ]
        (section, first, value, before), *others = differ
        listed = ", ".join(f"{called(*where)} ({value}, not {before})" for *where, value, before in others[:3])
        more = f"; also different: {listed}" if others else ""
        more += f" and {len(others) - 3} more" if len(others) > 3 else ""
        return f"resume: {called(section, first)} is {value}, but the run was started with {before}{more}"


def _apart(value: Any, before: Any) -> tuple[Any, Any]:
    """Of two lists what only one has, and how much both: names of many stores would hide it."""
    lists = isinstance(value, list) and isinstance(before, list)
    common = [each for each in value if each in before] if lists else []
    only = [[each for each in these if each not in common] for these in (value, before)] if common else []
    if not any(only):  # nothing is in both, or the order alone differs
        return value, before
    n = f"{len(common)} other{'s' if len(common) > 1 else ''}"
    value, before = (f"{', '.join(map(str, each))} and {n}" if each else f"the {n} alone" for each in only)
    return value, before


def size_text(n_bytes: int) -> str:
    """kB, MB, or GB."""
    for size, name in ((1e9, "GB"), (1e6, "MB")):
        if n_bytes >= size / 10:
            return f"{n_bytes / size:,.1f} {name}"
    return f"{n_bytes / 1e3:,.1f} kB"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'steps'?`, or nothing where no known one is near."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def printable(text: str) -> str:
    r"""The text as a terminal may have it, in one line: what is no printable character is written as \xNN or \uNNNN.

    That is control characters (newlines and terminal escapes among them), marks that turn the direction of writing,
    and the bytes of a file name that are not UTF-8 (os.fsdecode's surrogates: \xNN is then that byte). For printing
    alone: names in stores stay as they are.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
