"""saevlm-fast human-agreement: a score against the choices of people."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import check_writable, memory_figures
from saevlm_fast.cli.record import Record, settings_path
from saevlm_fast.cli.terminal import print_table, say
from saevlm_fast.config import DEVICE_HELP
from saevlm_fast.errors import require
from saevlm_fast.settings import setting, texts

if TYPE_CHECKING:
    import numpy as np

    from saevlm_fast.data.rows import Activations
    from saevlm_fast.measures.human import Benchmark

_LETTERS = 8  # of a number in activations.csv, about


@dataclass(frozen=True, kw_only=True)
class HumanAgreementArguments(WorkOptions):
    """Options of `saevlm-fast human-agreement`."""

    benchmark: Path = setting(help="The released archive, unpacked: pairs.csv, activations.csv, top16_images.csv.")
    output: Path = setting(help="Agreements: FILE.json.")
    embeddings: tuple[str, ...] = setting(
        (),
        help="Of the validation images in the archive's order, DINOv2-B or CLIP-B/32: their scores are judged too. "
        "Several: separated by commas, or the option given again.",
        parse=texts,
        place="path",
    )
    scores: tuple[str, ...] = setting(
        (),
        help="CSV files of columns k and score; several, as --embeddings.",
        parse=texts,
        place="path",
    )
    grid_embeddings: Path | None = setting(
        None, help="Of the training images, for the mean cosine of what people saw.", remote=True
    )
    force: bool = setting(False, help="Replace an output that is there.", recorded=False)
    device: str = setting("auto", help=DEVICE_HELP)

    def check(self) -> None:
        super().check()
        require(self.output.suffix == ".json", f"output: {self.output} does not end in .json")
        for each in (*self.embeddings, *self.scores):
            require(bool(each) and "\0" not in each, f"embeddings, scores: {each!r} is not a path")


def check(options: HumanAgreementArguments) -> None:
    """ValueError: the output may not be written, or is there."""
    from saevlm_fast.outputs import check_absent

    check_writable(options.output)
    check_absent([options.output, settings_path(options.output)], options.force)


def plan(options: HumanAgreementArguments) -> Plan:
    """What would be judged."""
    import torch

    from saevlm_fast.measures.human import ACTIVATIONS, read_benchmark

    check(options)
    benchmark = read_benchmark(options.benchmark)
    activations = benchmark.directory / ACTIVATIONS
    require(activations.is_file(), f"benchmark: {activations} is missing")
    _opened(options)
    return Plan(
        f"agreement of {len(options.scores) + 2 * len(options.embeddings)} scores with people",
        {
            "pairs": len(benchmark.x_P),
            "neurons": len(benchmark.neurons),
            **memory_figures(torch.device("cpu"), 4 * activations.stat().st_size // _LETTERS),
        },
    )


def _opened(options: HumanAgreementArguments) -> "dict[str, Activations]":
    from saevlm_fast.data.rows import open_activations

    return {path: open_activations(path) for path in options.embeddings}


@command("human-agreement", plan=plan)
def human_agreement(options: HumanAgreementArguments) -> dict[str, Any]:
    """How often a score prefers the neuron that people found clearer, beside what needs no images at all."""
    from saevlm_fast.files import write_json_atomic
    from saevlm_fast.measures.human import all_agreements, read_benchmark
    from saevlm_fast.measures.results import plain
    from saevlm_fast.outputs import output_lock

    with output_lock(options.output, directory=False):
        check(options)
        benchmark = read_benchmark(options.benchmark)
        scores, verified = _scores(options, benchmark)
        document = {
            "format": "saevlm-fast human agreement",
            "version": 1,
            "benchmark": str(options.benchmark),
            "pairs": len(benchmark.x_P),
            "neurons": len(benchmark.neurons),
            "verified": verified,
            "scores": all_agreements(benchmark, scores),
        }
        write_json_atomic(options.output, plain(document))
        Record("human-agreement", options, options.output, pairs=len(benchmark.x_P)).write()
    _print(document)
    say(f"wrote {options.output}")
    return plain({"output": str(options.output), **document})


def _scores(options: HumanAgreementArguments, benchmark: "Benchmark") -> "tuple[dict[str, np.ndarray], dict[str, Any]]":
    """All by name, [K] each; and of the embeddings, which released score they gave again."""
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.measures.human import (
        baselines,
        ms_variants,
        read_activations,
        read_scores,
        top_cosine,
        verify_order,
    )
    from saevlm_fast.runtime import resolve_device

    opened = _opened(options)
    found = {path: read_scores(Path(path), benchmark) for path in options.scores}
    grid = None if options.grid_embeddings is None else open_activations(options.grid_embeddings)
    acts_KN = read_activations(benchmark)
    verified = {}
    for path, embeddings in opened.items():
        variants = ms_variants(acts_KN, embeddings, resolve_device(options.device))
        released, correlation = verify_order(benchmark, variants["paper"])
        verified[path] = {"released": released, "correlation": correlation}
        found |= {f"{name}, {path}": each for name, each in variants.items()}
    if grid is not None:
        found["mean cosine of the grid"] = top_cosine(benchmark, grid)
    return found | baselines(acts_KN), verified


def _print(document: dict[str, Any]) -> None:
    rows = []
    for name, each in document["scores"].items():
        pooled, macro = each["pooled"], each["macro"]
        odd = each["ties"] + each["n_undefined"]
        rows.append((name, *(f"{one['value']:.1%}" for one in (pooled, macro)), _interval(pooled), str(odd)))
    print_table(("score", "pooled", "macro", "pooled, 95 %", "counted half"), rows)
    say(
        f"{document['pairs']:,} pairs of {document['neurons']:,} neurons. Macro weighs bins of the released DINOv2 gap "
        "alike, so that it is mostly of pairs far apart; random is 50 %.",
        "A score that is corrected for its encoder's mean cosine has the same order, and so the same agreement.",
    )
    for path, each in document["verified"].items():
        say(f"{path}: gives the released {each['released']} scores again (correlation {each['correlation']:.4f})")


def _interval(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{low:.1%} to {high:.1%}"
