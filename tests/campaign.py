"""What goes wrong from outside: altered bytes, broken images, calls that nobody meant, killed runs, two on one output.

    python tests/campaign.py                          # every part
    python tests/campaign.py --part bytes --every-byte   # of a megabyte: store, codes, SAE, run; one bit each
    python tests/campaign.py --part bytes --sample 500     # so many of each: bytes, calls, killed runs, pairs
    python tests/campaign.py --part calls --page docs/reliability.md    # its table in that page is written anew

Seeded: the same bytes, bits and calls every time; the points of kills as far as a clock allows.
A byte's outcome is one of: "named", an error of one line with the name of the file or of its directory; "harmless",
what is read equals what was written; and what must not be: "unnamed" (an error that does not say where), "traceback"
(an error of another kind than the program's own) and "silent" (something else is read). Those of calls are in
helpers/fuzzed_calls.py, those of images in helpers/broken_images.py, those of killed runs and pairs in
helpers/cut_runs.py.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))  # as a script; pytest has it already

from broken_images import break_images

from cut_runs import KILLED, OUTPUTS, cut_runs, paired_runs
from fuzzed_calls import OUTCOMES as CALL_OUTCOMES
from fuzzed_calls import fuzz_calls
from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.codes import CodesWriter, open_codes
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.inspection import inspect, verify_inspected
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.checkpoints import RunDirectory
from saevlm_fast.training.run import train
from saevlm_fast.training.state import TrainingState
from small_world import build_world

STEPS = 6
OUTCOMES = ("named", "harmless", "unnamed", "traceback", "silent")
GOOD = ("named", "harmless", "done", "refused", "kills", "the same", "one worked, one refused")
GOOD += ("as it was", "other pixels")
BEGIN, END = "<!-- campaign {part}: begin -->", "<!-- campaign {part}: end -->"
RECIPE = TrainConfig(steps=STEPS, batch_size=16, norm_batches=2)


class Sizes(NamedTuple):
    """Of the targets: rows and their width, latents of the run's SAE and of the other, which encodes k a row."""

    n_rows: int
    d_in: int
    d_run: int
    d_sae: int
    k: int


SMALL = Sizes(n_rows=90, d_in=8, d_run=24, d_sae=24, k=3)  # some kilobytes each
LARGE = Sizes(n_rows=3000, d_in=32, d_run=50, d_sae=1920, k=15)  # a megabyte together


class Target(NamedTuple):
    """What is altered: the files of `directory` below `root`, which `read` reads (from a copy, if it writes)."""

    name: str
    root: Path
    directory: Path
    read: Callable[[Path], Any]
    writes: bool = False


def build(root: Path, sizes: Sizes = SMALL) -> list[Target]:
    """One of everything."""
    n = sizes.n_rows
    x_ND = torch.randn(n, sizes.d_in, generator=torch.Generator().manual_seed(0))
    items = {"image": [f"{i // 2}.jpg" for i in range(n)], "token": list(range(n))}
    items["label"] = [None if i % 3 else f"class {i % 5}" for i in range(n)]
    source = {"layer": 3, "model": {"spec": "m"}}
    with ActivationWriter(root / "store", sizes.d_in, torch.float16, source, n * 4 // 9) as writer:
        writer.append(x_ND, items)
    acts = open_activations(root / "store")
    train(acts, matryoshka(sizes.d_in, sizes.d_run, 3), RECIPE, _options(root / "run"))
    sae = SparseAutoencoder(SAEConfig(sizes.d_in, sizes.d_sae, sizes.k, "topk"))
    sae.reset_parameters(0)
    sae.save_pretrained(root / "sae")
    with CodesWriter(root / "codes", sizes.d_sae, torch.float16, {"layer": 3}) as writer, torch.no_grad():
        for number, start in enumerate(range(0, n, n // 2)):
            part = {name: column[start : start + n // 2] for name, column in items.items()}
            writer.write_shard(number, sae.encode(x_ND[start : start + n // 2]), part)
    return [
        Target("store of activations", root, root / "store", read_store),
        Target("store of codes", root, root / "codes", read_codes),
        Target("SAE", root, root / "sae", read_sae),
        Target("run, resumed", root, root / "run", resume_run, writes=True),
        Target("run, `inspect --verify`", root, root / "run", verify_run),
    ]


def matryoshka(d_in: int, d_sae: int, k: int) -> SAEConfig:
    return SAEConfig(d_in, d_sae, k, "matryoshka", (d_sae // 3, d_sae - d_sae // 3))


def _options(output: Path) -> RunOptions:
    return RunOptions(output, "cpu", log_every=1, checkpoint_every=2)


def read_store(path: Path) -> Any:
    """As training and the score read it."""
    store = open_activations(path)
    rows = store.rows(torch.arange(store.n_rows))
    chunks = torch.cat([x for _, x in store.chunks(1 << 16)])
    return digest(rows), digest(chunks), store.items().to_pydict(), store.source


def read_codes(path: Path) -> Any:
    codes = open_codes(path)
    parts = [digest(*each.csr()) for _, each in codes.chunks(1 << 16)]
    return parts, codes.items().to_pydict(), codes.source, codes.d_sae


def read_sae(path: Path) -> Any:
    sae = SparseAutoencoder.from_pretrained(path)
    return digest(*sae.state_dict().values()), sae.config


def resume_run(path: Path) -> Any:
    """What the next step would start from, and what is logged so far."""
    store = open_activations(path.parent / "store")
    d_run = {each.d_in: each.d_run for each in (SMALL, LARGE)}[store.d]
    state = TrainingState(store, matryoshka(store.d, d_run, 3), RECIPE, torch.device("cpu"))
    RunDirectory(path, None, resume=True, force=False).begin(state)
    return digest(*state.tensors().values()), state.stepper.n_steps, (path / "metrics.jsonl").read_bytes()


def verify_run(path: Path) -> Any:
    """Whether the user is told: nothing that is verified may have changed."""
    found = inspect(path)
    verified = verify_inspected(found)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return found, verified, [(file.name, file.read_bytes()) for file in files]


def digest(*tensors: torch.Tensor) -> str:
    made = hashlib.sha256()
    for tensor in tensors:
        made.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        made.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return made.hexdigest()


def flips(target: Target, sample: int | None, seed: int = 0) -> Iterator[tuple[Path, int, int]]:
    """(file, byte, bit): every byte of the target's files or, of all of them, an even sample; the bit is drawn."""
    places = [
        (file, position)
        for file in sorted(target.directory.rglob("*"))
        if file.is_file()
        for position in range(file.stat().st_size)
    ]
    draw = random.Random(f"{seed} {target.name}")
    chosen = places if sample is None or sample >= len(places) else draw.sample(places, sample)
    return ((file, position, draw.randrange(8)) for file, position in chosen)


def outcome(target: Target, directory: Path, expected: Any, file: Path, position: int, bit: int) -> tuple[str, str]:
    """(one of OUTCOMES, what was said) of a bit flipped in `directory`, which is as it was afterwards."""
    altered = directory / file.relative_to(target.directory)
    with open(altered, "r+b", buffering=0) as stream:
        whole = os.pread(stream.fileno(), 1, position)
        os.pwrite(stream.fileno(), bytes([whole[0] ^ 1 << bit]), position)
    before = _signatures(directory) if target.writes else {}
    try:
        found = target.read(directory)
    except (ValueError, OSError) as error:
        said = str(error)
        named = file.name in said or str(file.parent.name) in said
        return ("named" if named and said.strip() and "\n" not in said else "unnamed"), said
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        if target.writes:
            _restore(target, directory, before, altered)
        else:
            with open(altered, "r+b", buffering=0) as stream:
                os.pwrite(stream.fileno(), whole, position)
    return ("harmless" if found == expected else "silent"), ""


def _signatures(directory: Path) -> dict[Path, tuple[int, int]]:
    """Every file there, and what a write, a rename or a removal changes of it."""
    statuses = {path.relative_to(directory): path.stat() for path in directory.rglob("*") if path.is_file()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in statuses.items()}


def _restore(target: Target, directory: Path, before: dict[Path, tuple[int, int]], altered: Path) -> None:
    """Undoes what a reader that writes has written since, and the alteration."""
    after = _signatures(directory)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    for name in changed | {altered.relative_to(directory)}:
        if name in before:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(target.directory / name, directory / name)
        else:
            (directory / name).unlink()


def _copy(target: Target, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(target.directory, directory)


def run(
    target: Target, sample: int | None, tell: Callable[[str], None] = print, share: tuple[int, int] = (0, 1)
) -> Counter[str]:
    """How often which outcome; what must not be is told. share: (which, of how many) parts of the flips."""
    directory = target.directory
    if target.writes:
        directory = target.root / "copy" / target.directory.name
        _copy(target, directory)
        if not (directory.parent / "store").exists():
            (directory.parent / "store").symlink_to(target.root / "store")
    expected = target.read(directory)
    if target.writes:
        _copy(target, directory)
    counts: Counter[str] = Counter()
    for file, position, bit in islice(flips(target, sample), share[0], None, share[1]):
        kind, said = outcome(target, directory, expected, file, position, bit)
        counts[kind] += 1
        if kind not in ("named", "harmless"):
            tell(f"{kind}: {target.name}: {file.name}, byte {position}, bit {bit}: {said}")
    return counts


# The parts ------------------------------------------------------------------------------------------------------------

Results = dict[str, Counter[str]]


def bytes_part(root: Path, sample: int | None) -> Results:
    """Every byte of small files of every kind, or a sample of each."""
    return {target.name: run(target, sample) for target in build(root)}


def every_byte(root: Path, processes: int) -> Results:
    """Every byte of a megabyte, in several processes, each on files of its own."""
    results: Results = {}
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        asked = [(root / str(number), (number, processes)) for number in range(processes)]
        for counted in pool.starmap(_share_of_every_byte, asked, chunksize=1):
            for name, counts in counted.items():
                results[name] = results.get(name, Counter()) + counts
    return results


def _share_of_every_byte(root: Path, share: tuple[int, int]) -> Results:
    results = {}
    for target in build(root, LARGE):
        results[target.name] = run(target, None, share=share)
        print(f"{target.name}, share {share[0]}: {dict(results[target.name])}", file=sys.stderr, flush=True)
    return results


def calls_part(root: Path, sample: int | None) -> Results:
    """1,500 calls over all commands."""
    return fuzz_calls(build_world(root / "world"), sample or 1500)


def kills_part(root: Path, sample: int | None) -> Results:
    """20 runs of each command that resumes."""
    world = build_world(root / "world")
    return {name: cut_runs(world, name, sample or 20) for name in KILLED}


def pairs_part(root: Path, sample: int | None) -> Results:
    """Five pairs of each command that writes."""
    return paired_runs(build_world(root / "world"), OUTPUTS, sample or 5)


def images_part(root: Path, sample: int | None) -> Results:
    """1,000 broken images of each format."""
    return break_images(sample or 1000)


class Part(NamedTuple):
    """A part of the campaign, and how its table is headed."""

    make: Callable[[Path, int | None], Results]
    first: str
    count: str
    columns: dict[str, str]


PARTS = {
    "bytes": Part(
        bytes_part,
        "altered",
        "bytes",
        dict(zip(OUTCOMES, ("named error", "harmless", "error without a name", "traceback", "silent"))),
    ),
    "calls": Part(calls_part, "command", "calls", {name: name for name in CALL_OUTCOMES}),
    "kills": Part(
        kills_part,
        "command",
        "runs",
        {
            "kills": "kills",
            "the same": "the same as unbroken",
            "another result": "another",
            "not resumed": "not resumed",
        },
    ),
    "images": Part(
        images_part,
        "format",
        "files",
        {
            "refused": "refused",
            "as it was": "the same pixels",
            "other pixels": "other pixels, no checksum",
            "silent": "silent",
            "traceback": "traceback",
            "hang": "hang",
        },
    ),
    "pairs": Part(
        pairs_part, "command", "pairs", {"one worked, one refused": "one worked, one refused", "other": "other"}
    ),
}


def table(results: Results, part: str = "bytes") -> str:
    """In Markdown."""
    _, first, count, columns = PARTS[part]
    lines = [f"| {first} | {count} | {' | '.join(columns.values())} |", f"|---|{'--:|' * (1 + len(columns))}"]
    for name, counts in results.items():
        cells = [f"{counts[kind]:,}" for kind in columns]
        lines.append(f"| {name} | {counts.total() - counts['kills']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(page: Path, part: str, text: str) -> None:
    """Between its marks in the page."""
    begin, end = (mark.format(part=part) for mark in (BEGIN, END))
    before, after = page.read_text().split(begin)[0], page.read_text().split(end)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--part", choices=PARTS, help="instead of all")
    options.add_argument("--sample", type=int, help="so many of each, instead of all")
    options.add_argument("--every-byte", action="store_true", help="part bytes: of a megabyte in place of small files")
    options.add_argument("--processes", type=int, default=2, help="with --every-byte")
    options.add_argument("--page", type=Path, help="page whose tables are written anew")
    given = options.parse_args()
    torch.set_num_threads(1)
    faults = 0
    for part in [given.part] if given.part else PARTS:
        with tempfile.TemporaryDirectory() as directory:
            if part == "bytes" and given.every_byte:
                results = every_byte(Path(directory), given.processes)
            else:
                results = PARTS[part].make(Path(directory), given.sample)
        text = table(results, part)
        print(text, flush=True)
        if given.page:
            write_table(given.page, part, text)
        faults += sum(counts[kind] for counts in results.values() for kind in counts if kind not in GOOD)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
