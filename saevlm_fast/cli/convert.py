"""saevlm-fast convert: an SAE of any library, as files of another."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import check_writable, disk_figures
from saevlm_fast.cli.record import Record
from saevlm_fast.cli.terminal import print_pairs, say, warn
from saevlm_fast.errors import require
from saevlm_fast.settings import check_once, setting, texts

if TYPE_CHECKING:
    from saevlm_fast.formats.plain import PlainSAE


def _pairs(name: str, text: str) -> tuple[str, ...]:
    """key=value, several separated by commas."""
    pairs = texts(name, text)
    for pair in pairs:
        require("=" in pair and not pair.startswith("="), f"{name}: {pair!r} is not KEY=VALUE")
    check_once(name, tuple(pair.partition("=")[0] for pair in pairs))
    return tuple(pairs)


def _names(name: str, text: str) -> tuple[str, ...]:
    return tuple(texts(name, text))


@dataclass(frozen=True, kw_only=True)
class ConvertArguments(WorkOptions):
    """Options of `saevlm-fast convert`."""

    source: Path = setting(
        help="SAE of any known format (docs/formats.md): folder, file, hf:user/repo[@revision][/sae_id] or "
        "saelens:release/sae_id.",
        positional=True,
    )
    output: Path = setting(help="Directory for the new files.", positional=True)
    to: Literal["saelens", "sparsify", "dictionary_learning", "saev", "safetensors"] = setting(
        "saelens", help="Whose files are written; saelens is also this program's own."
    )
    lossy: bool = setting(False, help="Write it even where that format loses something; what, is said.")
    assume: tuple[str, ...] = setting(
        (),
        help="What the files do not say, KEY=VALUE; several: k=32,input_std=2.5 (docs/formats.md).",
        parse=_pairs,
        place="assumption",
    )
    trust_pickle: tuple[str, ...] = setting(
        (),
        help="Names of classes that a pickle of SOURCE may hold, or `all`: they are read as data, nothing is run.",
        parse=_names,
    )
    force: bool = setting(False, help="Replace the files of an SAE in OUTPUT.", recorded=False)


class Opened(NamedTuple):
    """An SAE that was read, what it was read from, and what the new files lose of it."""

    plain: "PlainSAE"
    format: str
    lost: list[str]


def _open(options: ConvertArguments) -> Opened:
    from saevlm_fast.formats import export, registry
    from saevlm_fast.formats.hub import resolve
    from saevlm_fast.formats.source import Source

    pairs = (pair.partition("=") for pair in options.assume)
    trust = "all" in options.trust_pickle or options.trust_pickle
    local = resolve(options.source)
    source = Source(local.path, trust, local.assume | {key: value for key, _, value in pairs})
    inside = source.folder.resolve() == options.output.resolve()
    require(not inside, f"output: {options.output} is where {options.source} lies; its files would be mixed")
    found = registry.detect(source)
    plain = registry.read(source)
    if local.repo is not None:
        plain = replace(plain, metadata={**plain.metadata, "hub": local.record()})
    return Opened(plain, found.name, export.check(plain, options.to, options.lossy))


def _occupied(output: Path) -> list[Path]:
    """Paths at which an SAE of any of these formats has files."""
    from saevlm_fast.formats.export import FILES

    return [output / name for name in FILES]


def plan(options: ConvertArguments) -> Plan:
    """What would be written."""
    from saevlm_fast.formats import export
    from saevlm_fast.outputs import check_absent

    check_writable(options.output)
    check_absent(_occupied(options.output), options.force)
    opened = _open(options)
    plain = opened.plain
    n_weights = 2 * plain.d_in * plain.d_sae + 2 * plain.d_sae + plain.d_in
    n_bytes = n_weights * export.written_dtype(plain, options.to).itemsize
    return Plan(
        f"{options.source} ({opened.format}) as files of {options.to}",
        {
            "sae": f"{plain.activation}, {plain.d_in:,} -> {plain.d_sae:,}, {_dtypes(plain, options.to)}",
            "lost": opened.lost or None,
            "doubts": list(plain.doubts) or None,
            "memory_bytes": 3 * n_bytes,
            **disk_figures(options.output, n_bytes),
        },
    )


@command("convert", plan=plan)
def convert(options: ConvertArguments) -> dict[str, Any]:
    """Write an SAE of any library as files of another: by default as SAELens', which are this program's own."""
    from saevlm_fast.formats import export
    from saevlm_fast.outputs import begin_replacement, check_absent, output_lock, publish, settle

    def remove_old(output: Path) -> None:
        for path in _occupied(output):
            path.unlink(missing_ok=True)

    with output_lock(options.output, directory=True):
        settle(options.output, remove_old)
        check_absent(_occupied(options.output), options.force)
        opened = _open(options)
        replacement = begin_replacement(options.output)
        export.write(opened.plain, replacement, options.to, options.lossy)
        files = sorted(path.name for path in replacement.iterdir())
        publish(options.output, remove_old)
        Record("convert", options, options.output, format=opened.format).write()
    for doubt in opened.plain.doubts:
        warn(doubt)
    for lost in opened.lost:
        warn(f"lost: {lost}")
    return _said(options, opened, files)


def _dtypes(plain: "PlainSAE", to: str) -> str:
    """As read, and as written where that is another one."""
    from saevlm_fast.formats.export import written_dtype

    read, written = (str(each).removeprefix("torch.") for each in (plain.W_enc.dtype, written_dtype(plain, to)))
    return read if read == written else f"{read}, written as {written}"


def _said(options: ConvertArguments, opened: Opened, files: list[str]) -> dict[str, Any]:
    from saevlm_fast.formats.export import written_dtype

    plain = opened.plain
    print_pairs(
        [
            ("read as", opened.format),
            ("activation", plain.activation),
            ("d_in -> d_sae", f"{plain.d_in:,} -> {plain.d_sae:,}"),
            ("k", "not known" if plain.k is None else str(plain.k)),
            ("dtype", _dtypes(plain, options.to)),
            *([("input", plain.input_norm)] if plain.input_norm != "none" else []),
        ]
    )
    for name in files:
        say(f"wrote {options.output / name}")
    return {
        "source": str(options.source),
        "format": opened.format,
        "output": str(options.output),
        "to": options.to,
        "files": [str(options.output / name) for name in files],
        "activation": plain.activation,
        "d_in": plain.d_in,
        "d_sae": plain.d_sae,
        "k": plain.k,
        "dtype": str(written_dtype(plain, options.to)).removeprefix("torch."),
        "input_norm": plain.input_norm,
        "lost": opened.lost,
        "doubts": list(plain.doubts),
    }
