"""Several SAEs of one command: comma lists and [[sweep]] tables become settings of each, and names of directories."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

from saevlm_fast.config import SELECTING, SAESize, TrainConfig
from saevlm_fast.errors import require
from saevlm_fast.settings import Several, settings_of

Table = dict[str, Any]


def expanded(given: Mapping[str, Any]) -> tuple[Table, tuple[Table, ...]]:
    """What was given once, and the settings of each SAE; none of a command for one.

    Every combination of the lists' values, the last list's fastest; with tables, every table with each of these.

    Raises:
        ValueError: a setting in a list and in a table, or in a table one that all SAEs share; a list of what another
            setting excludes.
    """
    lists = {name: value for name, value in given.items() if isinstance(value, Several)}
    tables: Sequence[Table] = given.get("sweep", ())
    base = {name: value for name, value in given.items() if name not in lists and name != "sweep"}
    if not lists and not tables:
        return base, ()
    sizes: Any = SAESize
    recipe: Any = TrainConfig
    known = {*settings_of(sizes), *settings_of(recipe)} - set(TrainConfig.shared)
    for name in lists:
        for other in settings_of(sizes)[name].instead_of if name in settings_of(sizes) else ():
            require(other not in base, f"{name}: give either {name} or {other}, not both")
    for number, table in enumerate(tables, 1):
        for name, value in table.items():
            where = f"[[sweep]] {number}: {name}"
            require(name in known, f"{where} is the same for all SAEs; give it beside [[sweep]]")
            require(not isinstance(value, Several), f"{where} of one table has several values")
            require(name not in lists, f"{where} is a list too")
    combined = [dict(zip(lists, values)) for values in product(*lists.values())]
    return base, tuple(table | one for table in (tables or [{}]) for one in combined)


def one_of(base: Table, table: Table) -> Table:
    """What is given for one of the SAEs."""
    sizes: Any = SAESize
    given = dict(base)
    for name in table:
        for other in settings_of(sizes)[name].instead_of if name in settings_of(sizes) else ():
            given.pop(other, None)
    given |= table
    if given.get("architecture", SAESize.architecture) not in SELECTING and "k" not in table:
        given.pop("k", None)
    return given


def names_of(tables: Sequence[Table]) -> list[str]:
    """The directory of each: what differs between them, as topk-x4-k10.

    Raises:
        ValueError: two would be the same.
    """
    keys = list(dict.fromkeys(name for table in tables for name in table))
    differ = [key for key in keys if len({repr(table.get(key)) for table in tables}) > 1]
    names = ["-".join(_part(key, table[key]) for key in differ if key in table) or "sae" for table in tables]
    for i, name in enumerate(names):
        require(name not in names[:i], f"sweep: two SAEs would both be in the directory {name}")
    return names


@contextmanager
def named(name: str, table: Table) -> Iterator[None]:
    """Around what is made of one SAE's settings: what is wrong with one of its table's says whose it is."""
    try:
        yield
    except ValueError as error:
        if str(error).partition(":")[0] not in table:
            raise
        raise type(error)(f"{name}: {error}") from error


def _part(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value.replace("/", "_")
    if isinstance(value, tuple | list):
        return f"{key}{'_'.join(f'{each:g}' for each in value)}"
    short = {"expansion": "x", "d_sae": "d", "k": "k"}.get(key, key.replace("_", "-"))
    short += "_" if short[-1].isdigit() else ""
    return f"{short}{value:g}" if isinstance(value, float) else f"{short}{value}"
