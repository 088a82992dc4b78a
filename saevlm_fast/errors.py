"""How this package refuses: one exception a kind of fault, one way to raise it, and one line of somebody else's error.

Every message names the argument (or the file), its value and the limit, in one line.
"""

from collections.abc import Iterable
from numbers import Integral


class ActivationError(ValueError):
    """Activations or codes that cannot be used; the message names the file, the value and the limit."""


class ImageError(ValueError):
    """An image that cannot be used. The message is the reason in one line, without the image's id."""


class Doubt(UserWarning):
    """What the files of an SAE do not say and was assumed; shown once."""


class Interrupted(Exception):
    """Long work was asked to stop and did so at a point from which it can go on; the message says how."""


def require(condition: bool, message: str, error: type[ValueError] = ValueError) -> None:
    """Raise error(message) unless the condition holds."""
    if not condition:
        raise error(message)


def whole_number(name: str, value: object, at_least: int = 1) -> int:
    """The value as Python's int. ValueError: another kind (true and false too), below the limit or 2^62 and more."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    require(whole, f"{name}: {value!r:.60} is not a whole number".replace("\n", " "))
    number = int(value)  # type: ignore[call-overload]
    require(at_least <= number < 2**62, f"{name}: {number} must be at least {at_least} and below 2^62")
    return number


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of an error's message, `longest` characters at most; its kind's name where it has none."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:longest]


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
