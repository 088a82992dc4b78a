"""Commands from dataclasses: one field is an option of the command line and a key of the file of --config.

    @dataclass(frozen=True, kw_only=True)
    class SyntheticArguments(WorkOptions):
        rows: int = setting(20_000, help="Images, N.", at_least=1)

    @command("synthetic", plan=plan)
    def synthetic(options: SyntheticArguments) -> dict[str, Any]: ...

What is given on the command line wins over the file, and the file over the default. Of what was given, `Arguments.of`
makes the options; the command prints its tables and returns what --json prints.
"""

import inspect
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, get_origin, get_type_hints

import typer
from rich.markup import escape

from saevlm_fast.cli.ranks import check_shares, one_voice
from saevlm_fast.cli.terminal import for_a_program, print_json, print_pairs, say, tell
from saevlm_fast.config.common import CACHE_GIB, CACHE_GIB_VARIABLE
from saevlm_fast.data.passes import told_of_passes
from saevlm_fast.errors import OtherSettings, did_you_mean, require
from saevlm_fast.remote.answers import RemoteError
from saevlm_fast.settings import (
    NUMBERS,
    Listed,
    Setting,
    Settings,
    Several,
    check_once,
    choices_of,
    declared_by,
    default_of,
    integer,
    kinds_of,
    number,
    path_of,
    setting,
    settings_of,
    title_of,
)

MADE = "made"  # the table of settings.toml that says how a result was made; nothing is read from it

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse autoencoders for vision-language models on Triton kernels, and their Monosemanticity Score.",
)


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What every command has."""

    title = "Options of every command"
    # What a run is known again by, and is no option, or not of that name: by name or section, the options it follows.
    made_from: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    resume_adds: ClassVar[bool] = False  # whether --resume may ask for more than the calls before it
    config: Path | None = setting(
        None,
        help="TOML file of settings: these names at the top, or in a table of the command's name. The command line "
        "wins.",
        in_file=False,
        recorded=False,
    )
    json: bool = setting(False, help="Print one JSON object.", in_file=False, recorded=False)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options, from the values that were given: the place for defaults that depend on others."""
        return cls(**given)

    def said(self, name: str) -> Any:
        """What settings.toml says of a setting; None is left out."""
        return getattr(self, name)


@dataclass(frozen=True, kw_only=True)
class WorkOptions(Options):
    """What every command has that does work."""

    title = "Options of every command"
    dry_run: bool = setting(
        False,
        help="Check the inputs, print what would be done and how long it takes; write nothing.",
        in_file=False,
        recorded=False,
    )
    cache_gib: float | None = setting(
        None,
        help="Bound on what is kept here of files that are elsewhere (https://, s3://, hf:// ...).",
        shown=f"{CACHE_GIB:g}",
        above=0,
        at_most=2**30,
        must="positive",
        recorded=False,
    )


class Plan(NamedTuple):
    """What --dry-run prints: a sentence, and figures by name; a name in _bytes or _seconds says what the figure is."""

    what: str
    figures: dict[str, Any]


class Command(NamedTuple):
    """A command: its name, its options, what it says of itself."""

    name: str
    options: Any
    help: str


COMMANDS: dict[str, Command] = {}


def command(
    name: str, plan: Callable[[Any], Plan] | None = None, shared: bool = False
) -> Callable[[Callable[[Any], dict[str, Any] | None]], Callable[[Any], dict[str, Any] | None]]:
    """Makes a function of its options a command of `app`. plan: what --dry-run does instead. shared: torchrun's
    processes share its work."""

    def add(function: Callable[[Any], dict[str, Any] | None]) -> Callable[[Any], dict[str, Any] | None]:
        cls = get_type_hints(function)["options"]
        COMMANDS[name] = Command(name, cls, inspect.getdoc(function) or "")

        def from_command_line(**values: Any) -> None:
            options = arguments(name, cls, values)
            check_shares(name, shared)
            with named_by_option(options), for_a_program(options.json), _bounded_cache(options), told_of_passes(tell):
                _check_output_is_not_read(options)
                if plan is not None and options.dry_run:
                    with one_voice():
                        planned = plan(options)
                    _print_plan(planned, options.json)
                    return
                result = function(options)
            if options.json and result is not None:
                print_json(result)

        from_command_line.__doc__ = function.__doc__
        parameters = [_parameter(cls, field, known) for field, known in ordered(cls) if known.on_command_line]
        from_command_line.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        from_command_line.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command(name)(from_command_line)
        return function

    return add


_RECORDS = ("index.json", "harvest.json", "run.json", "cfg.json", "config.json")
_PLACES = ("sae", "images", "labels", "embeddings", "words")  # texts that are paths, if one of the name is there


def _check_output_is_not_read(options: Any) -> None:
    """ValueError: --output is what another option names, also by another path; --force would have replaced it."""
    output = getattr(options, "output", None)
    if not isinstance(output, Path):
        return
    is_record = output.name in _RECORDS and output.is_file()
    require(not is_record, f"output: {output} is the record of a store, a run or an SAE; give another name")
    for field, known in ordered(type(options)):
        value = getattr(options, field)
        for each in value if isinstance(value, tuple) else (value,):
            named = isinstance(each, Path) or (isinstance(each, str) and (field in _PLACES or "/" in each))
            require(
                field == "output" or not named or not _are_same(output, each),
                f"output: {output} is {flag_of(field, known)} as well; what is read cannot be replaced",
            )


def _are_same(output: Path, named: str | Path) -> bool:
    try:
        return output.samefile(named)
    except (OSError, ValueError):  # one is not there, or is no path at all
        return False


@contextmanager
def named_by_option(options: Any) -> Iterator[None]:
    """A refusal that begins with what was given, as `hf:NAME: ...` or `FOLDER/file: ...`, begins with whose it is.

    What opens a model or a file knows its name and not the option: --model, --clip and --text-model are opened alike.
    """
    try:
        yield
    except OtherSettings as error:
        raise ValueError(error.told(partial(called, options))) from error
    except (ValueError, RemoteError) as error:
        name = _option_of(str(error), options)
        if name is None:
            raise
        kind = RemoteError if isinstance(error, RemoteError) else ValueError
        raise kind(f"{name}: {error}") from error


def called(options: Any, section: str, name: str) -> str:
    """A setting of a run as the command line knows it: `d_sae (--expansion)`, or an option's own name."""
    known = dict(ordered(type(options)))
    own = (name,) if name in known else options.made_from.get(section, ())
    follows = options.made_from.get(name, own)
    given = [each for each in follows if follows == (name,) or getattr(options, each) is not None]
    flags = [flag_of(each, known[each]) for each in given]
    return name if flags in ([], [f"--{name.replace('_', '-')}"]) else f"{name} ({', '.join(flags)})"


def _option_of(message: str, options: Any) -> str | None:
    """The option of which a message begins with a value; of several the one of the longest value, then the first."""
    known = {key_of(field, each): (field, each) for field, each in ordered(type(options))}
    found: dict[str, int] = {}
    for name, (field, each) in known.items():
        value = () if each.positional else getattr(options, field)
        for given in value if isinstance(value, tuple) else (value,):
            text = str(given)
            is_place = isinstance(given, Path) or (isinstance(given, str) and re.search(r"[:/.]", text) is not None)
            begins: tuple[str, ...] = (f"{text}:", f"{text}/", f"{text!r}:")
            if is_place:
                begins += f"{text} ", f"{text!r} "
            else:  # a folder's name may be any word; a sentence may begin with any word as well
                is_place = isinstance(given, str) and given not in ("", default_of(type(options), field))
            if is_place and text not in known and message.startswith(begins):
                found[name] = max(len(text), found.get(name, 0))
    return max(found, key=lambda name: found[name], default=None)


@contextmanager
def _bounded_cache(options: Any) -> Iterator[None]:
    """By the environment, which worker processes have too."""
    before, given = os.environ.get(CACHE_GIB_VARIABLE), getattr(options, "cache_gib", None)
    if given is not None:
        os.environ[CACHE_GIB_VARIABLE] = f"{given:.17g}"
    try:
        yield
    finally:
        os.environ.pop(CACHE_GIB_VARIABLE, None)
        if before is not None:
            os.environ[CACHE_GIB_VARIABLE] = before


def _print_plan(plan: Plan, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json({"dry_run": True, "what": plan.what, **plan.figures})
        return
    say(f"dry run: {plan.what}")
    print_pairs((_label(name), _figure(name, value)) for name, value in plan.figures.items() if value is not None)
    tried = "Times and a forward's memory" if "a_forward_bytes" in plan.figures else "Times"
    say(f"Memory and disk are calculated. {tried} come from a short trial, unless their line says otherwise.")


def _label(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _figure(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        from saevlm_fast.files import human_bytes

        return human_bytes(value)
    if name.endswith("_seconds"):
        minutes, hours = value / 60, value / 3600
        return f"{value:.3g} s" if value < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
    if isinstance(value, list):
        return ", ".join(str(each) for each in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


_NUMBERS: dict[Any, Callable[[str, str], Any]] = {int: integer, float: number}
_LISTS_OF_TEXTS = (tuple[str, ...], tuple[Path, ...])  # which may have commas

# The command line -----------------------------------------------------------------------------------------------------


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


def _parameter(cls: Any, name: str, known: Setting) -> inspect.Parameter:
    """What Typer is told of a field. Its default is None: only what was given comes through."""
    kind, choices = kinds_of(cls)[name], choices_of(cls, name)
    brackets = ["required"] if is_needed(cls, name, known) else []
    brackets += [] if (default := default_text(cls, name, known)) is None else [f"default: {default}"]
    text = escape(known.help) + "".join(f"  \\[{each}]" for each in brackets)
    several = ",..." if known.swept else ""
    more: dict[str, Any] = {"help": text, "show_default": False, "rich_help_panel": title_of(cls, name)}
    if kind is Path and not known.positional:
        more |= {"metavar": "PATH"}
    elif choices:
        more |= {
            "metavar": "|".join(choices) + (",..." if known.swept else ""),
            "autocompletion": lambda: list(choices),
        }
    elif get_origin(kind) is tuple:
        more |= {"metavar": "<a,b,...>"}
    elif kind in _NUMBERS and known.parse is None:
        more |= {"metavar": f"<{kind.__name__}>{several}"}
    if known.positional:
        told = typer.Argument(None, **more)
    else:
        flag = flag_of(name, known)  # what a file can turn on, the command line can turn off
        told = typer.Option(None, f"{flag}/--no-{flag[2:]}" if kind is bool and known.in_file else flag, **more)
    kind = _typer_kind(kind, known, bool(choices))
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=told, annotation=kind)


def _typer_kind(kind: Any, known: Setting, has_choices: bool) -> Any:
    if get_origin(kind) is tuple:
        return list[str] | None
    # Typer takes "" for the working directory, and does not say which text is no number.
    if has_choices or known.parse is not None or kind is Path or kind in _NUMBERS:
        return str | None
    return kind | None


def arguments(name: str, cls: Any, values: Mapping[str, Any]) -> Any:
    """The options of a command, from what Typer has read, and the file of --config if there is one.

    Raises:
        ValueError: what the file, a value or their combination are refused for; what is needed and was not given.
    """
    known = settings_of(cls)
    given = {field: _from_text(cls, field, value) for field, value in values.items() if _was_given(value)}
    from_file = read_config(given["config"], name, cls) if "config" in given else {}
    for field in _used(given):
        for other in known[field].instead_of:
            from_file.pop(other, None)
    given = from_file | given
    for field, _ in ordered(cls):
        if is_needed(cls, field, known[field]) and field not in given:
            key, flag = key_of(field, known[field]), flag_of(field, known[field])
            raise ValueError(f"{key}: needed; give {flag}, or {key} in the file of --config")
    return cls.of(given)


def _was_given(value: Any) -> bool:
    return value is not None and value != []


def _from_text(cls: Any, name: str, value: Any) -> Any:
    known = settings_of(cls)[name]
    key = key_of(name, known)
    if kinds_of(cls)[name] is Path:
        return path_of(key, value)
    require(value != "", f"{key}: is empty")
    if known.swept and isinstance(value, str) and "," in value:
        parts = [part.strip() for part in value.split(",")]
        require("" not in parts, f"{key}: {value!r} has a value that is empty")
        return several_of(key, parts, lambda part: _from_text(cls, name, part))
    if known.parse is None:
        return _NUMBERS[kind](key, value) if (kind := kinds_of(cls)[name]) in _NUMBERS else value
    return known.parse(name, ",".join(value) if isinstance(value, list) else value)


def several_of(key: str, parts: Sequence[Any], read: Callable[[Any], Any]) -> Several:
    """The values of a list, each once. ValueError: one that is twice in it."""
    values = Several(read(part) for part in parts)
    check_once(key, values)
    return values


# The file -------------------------------------------------------------------------------------------------------------


def read_config(path: Path, name: str, cls: Any) -> dict[str, Any]:
    """The settings of a command in a TOML file: keys at the top, and those of its table, which win.

    Raises:
        ValueError: no TOML; a key that is no setting of the command, with the nearest that is; a value of another kind.
        OSError: it cannot be read.
    """
    require(path.is_file(), f"config: {path} is not a file")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except RecursionError:
        raise ValueError(f"{path}: not valid TOML (nested too deeply)") from None
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path}: not valid TOML ({error})") from None
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    for table in tables:
        near = did_you_mean(table, COMMANDS)
        require(table.replace("_", "-") in COMMANDS or table == MADE, f"{path}: [{table}] is not a command{near}")
    top = {key: value for key, value in document.items() if key not in tables}
    own = next((tables[table] for table in tables if table.replace("_", "-") == name), {})
    others = ", ".join(f"[{table}]" for table in tables if table not in (MADE, name, name.replace("-", "_")))
    require(bool(top or own) or not others, f"{path}: says nothing of {name}, only of {others}")
    top, own = _checked(top, str(path), name, cls), _checked(own, str(path), name, cls)
    for field in _used(own):
        for other in settings_of(cls)[field].instead_of:
            top.pop(other, None)
    return top | own


def _used(given: Mapping[str, Any]) -> list[str]:
    """What was given and excludes others: a flag that is off does not, nor does a list of nothing."""
    return [field for field, value in given.items() if value is not False and value != ()]


def _checked(table: Mapping[str, Any], where: str, name: str, cls: Any) -> dict[str, Any]:
    """The settings of a table by the names of fields. where: it stands, for messages."""
    settings = {field: known for field, known in settings_of(cls).items() if known.in_file}
    fields = {key_of(field, known): field for field, known in settings.items()} | {field: field for field in settings}
    found: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for key, value in cls.without_removed(table, where).items():
        field = fields.get(key.replace("-", "_"))
        if field is None:
            raise ValueError(
                f"{where}: {key!r} is not a setting of {name}{did_you_mean(key.replace('-', '_'), fields)}"
            )
        require(field not in found, f"{where}: {spelt.get(field)!r} and {key!r} are one setting; give it once")
        spelt[field] = key
        if value == [] and default_of(cls, field) == ():  # as settings.toml has what was left open
            found[field] = ()
            continue
        if settings[field].tables:
            listed = isinstance(value, list) and len(value) > 0 and all(isinstance(each, dict) for each in value)
            require(listed, f"{where}: {key} is not a list of tables, [[{key}]]")
            tables = [(f"{where}: [[{key}]] {number}", each) for number, each in enumerate(value, 1)]
            found[field] = tuple(_checked(each, where, name, cls) for where, each in tables)
            continue
        found[field] = _from_file(f"{where}: {key}", kinds_of(cls)[field], settings[field], value)
    return found


def _from_file(where: str, kind: Any, known: Setting, value: Any) -> Any:
    """A TOML value as the field has it; lists may also be written as on the command line."""
    if known.swept and isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",")]
        value = [_NUMBERS[kind](where, part) for part in value] if kind in _NUMBERS and not known.parse else value
    if known.swept and isinstance(value, list):
        require(len(value) > 0, f"{where}: is an empty list")
        return several_of(where, value, lambda part: _from_file(where, kind, known, part))
    if known.parse is not None:
        if isinstance(value, list):
            said = [str(each) for each in value]
            return known.parse(where, Listed(said) if kind in _LISTS_OF_TEXTS else ",".join(said))
        require(isinstance(value, str | int | float) and not isinstance(value, bool), f"{where} = {value!r} is no text")
        return known.parse(where, str(value))
    what, accepted = NUMBERS.get(kind, ("a text", str))
    fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    require(fits, f"{where} = {value!r} is not {what}")
    require(value != "", f"{where}: is empty")
    return path_of(where, value) if kind is Path else float(value) if kind is float else value
