"""Byte flips: every file that this program writes is altered, bit by bit, and read as the program reads it.

    python tests/campaign.py                  # every byte of a store, a store of codes, an SAE and a run, one bit each
    python tests/campaign.py --sample 500     # so many bytes of each, drawn evenly (the tests do that with fewer)
    python tests/campaign.py --page docs/reliability.md    # the table in that page is written anew

Seeded: the same bytes and bits every time. An outcome is one of: "named", an error of one line with the name of the
file or of its directory; "harmless", what is read equals what was written; and what must not be: "unnamed" (an error
that does not say where), "traceback" (an error of another kind than the program's own) and "silent" (something else is
read).
"""

import argparse
import hashlib
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.codes import CodesWriter, open_codes
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.inspection import inspect, verify_inspected
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.checkpoints import RunDirectory
from saevlm_fast.training.run import train
from saevlm_fast.training.state import TrainingState

D_IN, D_SAE, N_ROWS, STEPS = 8, 24, 90, 6
OUTCOMES = ("named", "harmless", "unnamed", "traceback", "silent")
BEGIN, END = "<!-- campaign: begin -->", "<!-- campaign: end -->"
RECIPE = TrainConfig(steps=STEPS, batch_size=16, norm_batches=2)


class Target(NamedTuple):
    """What is altered: the files of `directory` below `root`, which `read` reads (from a copy, if it writes)."""

    name: str
    root: Path
    directory: Path
    read: Callable[[Path], Any]
    writes: bool = False


def build(root: Path) -> list[Target]:
    """One of everything, small."""
    x_ND = torch.randn(N_ROWS, D_IN, generator=torch.Generator().manual_seed(0))
    items = {"image": [f"{i // 2}.jpg" for i in range(N_ROWS)], "token": list(range(N_ROWS))}
    items["label"] = [None if i % 3 else f"class {i % 5}" for i in range(N_ROWS)]
    with ActivationWriter(root / "store", D_IN, torch.float16, {"layer": 3, "model": {"spec": "m"}}, 40) as writer:
        writer.append(x_ND, items)
    config = SAEConfig(D_IN, D_SAE, 3, "matryoshka", (8, 16))
    acts = open_activations(root / "store")
    train(acts, config, RECIPE, RunOptions(root / "run", "cpu", log_every=1, checkpoint_every=2))
    sae = SparseAutoencoder.from_pretrained(root / "run")
    sae.save_pretrained(root / "sae")
    with CodesWriter(root / "codes", D_SAE, torch.float16, {"layer": 3}) as writer, torch.no_grad():
        for number, start in enumerate(range(0, N_ROWS, 45)):
            part = {name: column[start : start + 45] for name, column in items.items()}
            writer.write_shard(number, sae.encode(x_ND[start : start + 45]), part)
    return [
        Target("store of activations", root, root / "store", read_store),
        Target("store of codes", root, root / "codes", read_codes),
        Target("SAE", root, root / "sae", read_sae),
        Target("run, resumed", root, root / "run", resume_run, writes=True),
        Target("run, `inspect --verify`", root, root / "run", verify_run),
    ]


def read_store(path: Path) -> Any:
    """As training and the score read it."""
    store = open_activations(path)
    rows = store.rows(torch.arange(store.n_rows))
    chunks = torch.cat([x for _, x in store.chunks(32)])
    return digest(rows), digest(chunks), store.items().to_pydict(), store.source


def read_codes(path: Path) -> Any:
    codes = open_codes(path)
    parts = [digest(*each.csr()) for _, each in codes.chunks(32)]
    return parts, codes.items().to_pydict(), codes.source, codes.d_sae


def read_sae(path: Path) -> Any:
    sae = SparseAutoencoder.from_pretrained(path)
    return digest(*sae.state_dict().values()), sae.config


def resume_run(path: Path) -> Any:
    """What the next step would start from, and what is logged so far."""
    store = open_activations(path.parent / "store")
    state = TrainingState(store, SAEConfig(D_IN, D_SAE, 3, "matryoshka", (8, 16)), RECIPE, torch.device("cpu"))
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


def outcome(target: Target, expected: Any, file: Path, position: int, bit: int) -> tuple[str, str]:
    """(one of OUTCOMES, what was said)."""
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[position] ^= 1 << bit
    if target.writes:
        place = target.root / "copy"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        os.symlink(target.root / "store", place / "store")
        shutil.copytree(target.directory, place / target.directory.name)
        directory = place / target.directory.name
    else:
        directory = target.directory
    place_of_file = directory / file.relative_to(target.directory)
    place_of_file.write_bytes(altered)
    try:
        found = target.read(directory)
    except (ValueError, OSError) as error:
        said = str(error)
        named = file.name in said or str(file.parent.name) in said
        return ("named" if named and said.strip() and "\n" not in said else "unnamed"), said
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        if not target.writes:
            file.write_bytes(whole)
    return ("harmless" if found == expected else "silent"), ""


def run(target: Target, sample: int | None, tell: Callable[[str], None] = print) -> Counter[str]:
    """How often which outcome; what must not be is told."""
    if target.writes:
        shutil.copytree(target.directory, target.root / "copy" / target.directory.name, dirs_exist_ok=True)
        if not (target.root / "copy" / "store").exists():
            os.symlink(target.root / "store", target.root / "copy" / "store")
        expected = target.read(target.root / "copy" / target.directory.name)
    else:
        expected = target.read(target.directory)
    counts: Counter[str] = Counter()
    for file, position, bit in flips(target, sample):
        kind, said = outcome(target, expected, file, position, bit)
        counts[kind] += 1
        if kind not in ("named", "harmless"):
            tell(f"{kind}: {target.name}: {file.name}, byte {position}, bit {bit}: {said}")
    return counts


def table(results: dict[str, Counter[str]]) -> str:
    """In Markdown."""
    lines = ["| altered | bytes | named error | harmless | error without a name | traceback | silent |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for name, counts in results.items():
        cells = [f"{counts[kind]:,}" for kind in OUTCOMES]
        lines.append(f"| {name} | {counts.total():,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--sample", type=int, help="bytes of each, instead of all")
    options.add_argument("--page", type=Path, help="page whose table is written anew")
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        results = {target.name: run(target, given.sample) for target in build(Path(directory))}
    text = table(results)
    print(text)
    if given.page:
        before, after = given.page.read_text().split(BEGIN)[0], given.page.read_text().split(END)[1]
        given.page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return int(any(counts[kind] for counts in results.values() for kind in OUTCOMES[2:]))


if __name__ == "__main__":
    sys.exit(main())
