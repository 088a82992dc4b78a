"""Commands, and what people call their settings: on the command line, in a file, in a message."""

from dataclasses import MISSING
from typing import Any, NamedTuple

from saevlm_fast.settings import Setting, declared_by, default_of, settings_of


class Command(NamedTuple):
    """A command: its name, its options, what it says of itself."""

    name: str
    options: Any
    help: str


COMMANDS: dict[str, Command] = {}


def key_of(name: str, known: Setting) -> str:
    """The name of a setting for users, in a file; with dashes it is that of the option."""
    return known.option or name


def flag_of(name: str, known: Setting) -> str:
    """--checkpoint-every, or PATH of what is given by its place."""
    key = key_of(name, known)
    return key.upper() if known.positional else "--" + key.replace("_", "-")


def default_text(cls: Any, name: str, known: Setting) -> str | None:
    """The default for people; None if there is none, or it is the absence of a thing."""
    default = default_of(cls, name)
    if known.shown is not None:
        return known.shown
    if default is MISSING or default is None or default is False or default == ():
        return None
    if isinstance(default, tuple):
        return ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in default)
    return str(default)


def ordered(cls: Any) -> list[tuple[str, Setting]]:
    """The settings of a command as people read them: its own first, then those of its bases, one after the other."""
    return sorted(settings_of(cls).items(), key=lambda item: cls.__mro__.index(declared_by(cls, item[0])))


def is_needed(cls: Any, name: str, known: Setting) -> bool:
    """Whether it must be given."""
    return default_of(cls, name) is MISSING and known.shown is None


def called(options: Any, section: str, name: str) -> str:
    """A setting of a run as the command line knows it: `d_sae (--expansion)`, or an option's own name."""
    known = dict(ordered(type(options)))
    own = (name,) if name in known else options.made_from.get(section, ())
    follows = options.made_from.get(name, own)
    given = [each for each in follows if follows == (name,) or getattr(options, each) is not None]
    flags = [flag_of(each, known[each]) for each in given]
    return name if flags in ([], [f"--{name.replace('_', '-')}"]) else f"{name} ({', '.join(flags)})"
