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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, get_type_hints

import typer

from saevlm_fast.cli.command_line import arguments, parameter
from saevlm_fast.cli.from_anywhere import path_in
from saevlm_fast.cli.names import COMMANDS, Command, called, flag_of, key_of, ordered
from saevlm_fast.cli.ranks import check_shares, one_voice
from saevlm_fast.cli.terminal import for_a_program, print_json, print_pairs, say, tell
from saevlm_fast.config.common import CACHE_GIB, CACHE_GIB_VARIABLE
from saevlm_fast.data.passes import told_of_passes
from saevlm_fast.errors import OtherSettings, require
from saevlm_fast.remote.answers import RemoteError
from saevlm_fast.settings import Settings, default_of, setting

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
        parameters = [parameter(cls, field, known) for field, known in ordered(cls) if known.on_command_line]
        from_command_line.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        from_command_line.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command(name)(from_command_line)
        return function

    return add


_RECORDS = ("index.json", "harvest.json", "run.json", "cfg.json", "config.json")


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
            named = path_in(known, each)
            require(
                field == "output" or named is None or not _are_same(output, named),
                f"output: {output} is {flag_of(field, known)} as well; what is read cannot be replaced",
            )


def _are_same(output: Path, named: Path) -> bool:
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
