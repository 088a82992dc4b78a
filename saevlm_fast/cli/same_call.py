"""That torchrun's processes were started alike, and read the same: on two machines nothing else sees to it.

Each would go on by its own options and files, and where the shapes of what they tell each other agree, the result would
be of neither.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from saevlm_fast import __version__
from saevlm_fast.errors import require, shown
from saevlm_fast.settings import kinds_of, settings_of

if TYPE_CHECKING:
    from saevlm_fast.cli.options import Options
    from saevlm_fast.data.codes import StoredCodes
    from saevlm_fast.data.rows import Activations

# A machine has its own cores, GPUs, disks, and file of --config; who reads the output has a terminal on one of them.
_OF_THE_MACHINE = frozenset(("device", "workers", "cache_gib", "config", "json", "collective_timeout"))


class _Ranks(Protocol):
    def collect(self, value: Any) -> list[Any]: ...


def check_same_call(ranks: _Ranks | None, options: "Options") -> None:
    """All ranks call this at once.

    A path may be another on every machine, but it is given to all or to none.

    Raises:
        ValueError: (on all ranks) a rank runs another command or other code than rank 0, or has other options.
    """
    if ranks is not None:
        said = {"command": type(options).__name__, "code": _code(), **_said(options)}
        _check_alike(ranks, said, "every rank needs the same command")


def check_same_data(ranks: _Ranks | None, digests: Mapping[str, Any]) -> None:
    """All ranks call this at once, with digests of what each has read, by the names of its options.

    Raises:
        ValueError: (on all ranks) something is another for a rank than for rank 0.
    """
    if ranks is not None:
        _check_alike(ranks, digests, "every rank needs the same data")


def digest_of(rows: "Activations | StoredCodes") -> str:
    """Of all rows of a store; of a matrix, 64 rows spread over it."""
    if rows.has_items:
        return hashlib.sha256(rows.index_file.read_bytes()).hexdigest()
    import torch

    from saevlm_fast.data.rows import Activations

    assert isinstance(rows, Activations)  # codes are always of a store
    picked = torch.linspace(0, rows.n_rows - 1, 64, dtype=torch.float64).long()
    return f"{rows.n_rows} {hashlib.sha256(rows.rows(picked).numpy().tobytes()).hexdigest()}"


def _check_alike(ranks: _Ranks, known: Mapping[str, Any], advice: str) -> None:
    first, *others = ranks.collect(dict(known))
    for rank, theirs in enumerate(others, 1):
        for name, mine in first.items():  # another command has other options, and is told by its name
            its = theirs.get(name)
            require(mine == its, f"{name}: {shown(its)} for rank {rank}, but {shown(mine)} for rank 0; {advice}")


def _said(options: "Options") -> dict[str, Any]:
    cls: Any = type(options)
    found = {}
    for name, known in settings_of(cls).items():
        value, kind = getattr(options, name), kinds_of(cls)[name]
        if name in _OF_THE_MACHINE:
            continue
        if kind is Path:
            value = "not given" if value is None else "given"
        elif Path in get_args(kind):
            value = f"{len(value)} given"
        found[known.option or name] = value
    return found


def _code() -> str:
    """Versions, and a digest of the package's modules: those of a checkout change without a version.

    Of torch the version alone, without what it was built for: machines may have other GPUs.
    """
    from torch import __version__ as torch_version

    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted({*package.rglob("*.py"), *(package / "kernels").glob("*.py")}):  # there by a link in a checkout
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:8]}), torch {torch_version.partition('+')[0]}"
