"""Scripts that measure one case after the other: what fails is told, the others go on, the exit status is 1."""

import argparse
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import torch

from bench.helpers import machine
from bench.helpers.arguments import new_file
from saevlm_fast.errors import first_line
from saevlm_fast.files import write_json_atomic


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With --output and --device; `parsed` reads it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=new_file, required=True, help="JSON file, rewritten after every case")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    return options


def line(info: dict, seconds: list[float], device: str) -> dict:
    """One line of the JSON, with pytest-benchmark's keys; without seconds it failed. info: operation, case, more."""
    median = statistics.median(seconds) if seconds else 0.0
    return {
        "name": f"{info['operation']}[{info['case']}]",
        "stats": {"median": median, "rounds": len(seconds), "data": seconds},
        "extra_info": info | machine.describe(device),
    }


def run_all(
    names: Iterable[str],
    measured: Callable[[str], list[float]],
    result: Callable[[str, list[float]], dict],
    output: Path,
    done: str,
) -> NoReturn:
    """measured: seconds of each round, or what is wrong by ValueError or RuntimeError. done: said of all if none is."""
    results, failed = [], []
    for name in names:
        seconds: list[float] = []
        error: Exception | None = None
        try:
            seconds = measured(name)
        except (ValueError, RuntimeError) as raised:
            traceback.print_exc()
            failed.append(name)
            error = raised
        results.append(result(name, seconds))
        if error is not None:
            results[-1]["extra_info"]["failed"] = first_line(error)
        write_json_atomic(output, {"benchmarks": results})
    print("failed: " + ", ".join(failed) if failed else f"{len(results)} {done}")
    sys.exit(1 if failed else 0)
