"""One training step on a GPU, kernel by kernel: `python -m bench.training.profile_step --output FILE.json`.

Trains for some steps on planted concepts, so that codes are those of a run and not of random weights. Then the step
size is set to next to nothing, because replaying a step on one batch would train on it. What is timed is the step as
`Stepper.step` makes it, the same captured in a CUDA graph, and its encoder alone in one; the kernels are those of the
replayed graphs.
"""

import argparse
import dataclasses
import functools
import re
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.helpers import machine
from bench.helpers.arguments import new_file, positive
from bench.helpers.planted import planted_rows
from saevlm_fast.config import SELECTING, SAEConfig, TrainConfig
from saevlm_fast.files import write_json_atomic
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.capture import CapturedSteps
from saevlm_fast.training.gpu_codes import gpu_codes
from saevlm_fast.training.step import Stepper

N_BATCHES = 64
ROUNDS, REPLAYS, PROFILED = 20, 10, 20
SHOWN = 40
NO_STEP = 1e-30  # a learning rate


@functools.cache
def planted_batches(rows: int, d_in: int, device: str = "cuda") -> list[Tensor]:
    """Batches [B, d_in] of planted concepts, divided by the norm factor."""
    x_ND = planted_rows(N_BATCHES * rows, d_in, device)
    return list((x_ND / x_ND.square().sum(1).mean().sqrt()).split(rows))


def median_seconds(call: Callable[[], object]) -> list[float]:
    """Of each of ROUNDS rounds of REPLAYS calls, a call's mean time by the device's clock."""
    seconds = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(REPLAYS):
            call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / REPLAYS)
    return seconds


def kernels(call: Callable[[], object]) -> list[dict]:
    """What runs on the device in one call, the longest first: name, microseconds, launches."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    microseconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = short_name(event.name)
            microseconds[name] += event.time_range.elapsed_us()
            launches[name] += 1
    return [
        {"kernel": name, "us": total / PROFILED, "launches": launches[name] / PROFILED}
        for name, total in microseconds.most_common()
    ]


def rates() -> dict[str, float]:
    """What the chip reaches with plain torch: a large float16 product, and a copy (bytes read and written)."""
    half = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    product = statistics.median(median_seconds(lambda: half @ half))
    copy = statistics.median(median_seconds(lambda: target.copy_(source)))
    return {"float16 TFLOP/s": 2e-12 * 8192**3 / product, "copied TB/s": 2e-12 * source.nbytes / copy}


def short_name(name: str) -> str:
    """A C++ kernel without its arguments and most of its templates; Triton's as they are."""
    name = name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "").removeprefix("void ")
    inner = re.search(r"(\w*(?:[Ff]unctor|_kernel_cuda|Op)\w*)", name.partition("<")[2])
    outer = re.sub(r"<.*|\(.*", "", name).split("::")[-1]
    return f"{outer} ({inner[1]})"[:80] if inner else outer[:80]


def trained(architecture: Any, options: argparse.Namespace) -> tuple[CapturedSteps, Tensor]:
    """Steps that move nothing any more, and a batch where graphs read it."""
    config = TrainConfig(steps=options.steps, dead_after=10**9, threshold_start=0)
    sae = SparseAutoencoder(SAEConfig.sized(options.d_in, d_sae=options.d_sae, k=options.k, architecture=architecture))
    sae.reset_parameters(0)
    batches = planted_batches(options.rows, options.d_in)
    sae.b_dec.data.copy_(batches[0].mean(0))
    steps = CapturedSteps(Stepper(sae.to("cuda"), config))
    for step in range(options.steps):
        steps.step(batches[step % N_BATCHES])
    steps.stepper.config = dataclasses.replace(config, lr=NO_STEP)
    x_BD = steps.input(options.rows)
    assert x_BD is not None, "steps on a GPU are captured"
    return steps, x_BD


def captured_encoder(stepper: Stepper, x_BD: Tensor) -> Callable[[], None]:
    """The encoder of a step, with the low copy of W_enc that the last update has left."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        gpu_codes(stepper.sae, stepper.config, 1.0, x_BD, stepper.low.weights)
    return graph.replay


def profile(architecture: str, chip: dict[str, float], options: argparse.Namespace) -> list[dict]:
    """Three results, as report.py reads them: the step captured and eager, and its encoder captured."""
    steps, x_BD = trained(architecture, options)
    ways = {
        ("training step", "captured"): lambda: steps.step(x_BD),
        ("encode", "captured"): captured_encoder(steps.stepper, x_BD),
    }
    found = {way: kernels(call) for way, call in ways.items()}
    n_eager, results = steps.n_eager, []
    for (work, impl), call in (ways | {("training step", "eager"): lambda: steps.stepper.step(x_BD)}).items():
        info = {"operation": f"{architecture} {work}", "impl": impl} | chip
        results.append(result(info, median_seconds(call), found.get((work, impl)), options))
    assert steps.n_eager == n_eager, "what is timed as captured was eager"
    return results


def result(info: dict, seconds: list[float], found: list[dict] | None, options: argparse.Namespace) -> dict:
    """One line of the JSON, with pytest-benchmark's keys."""
    shape = {"B": options.rows, "d_in": options.d_in, "d_sae": options.d_sae, "k": options.k}
    info = {"case": f"d_sae {options.d_sae}", "dtype": "float32", "shape": shape} | info
    if found is not None:
        info |= {"kernels": found, "kernels_us": sum(each["us"] for each in found)}
    return {
        "name": f"{info['operation']}[{info['case']}-{info['impl']}]",
        "stats": {"median": statistics.median(seconds), "rounds": len(seconds), "data": seconds},
        "extra_info": info | machine.describe("cuda"),
    }


def progress(captured: dict, encode: dict, eager: dict) -> str:
    """The times, and the longest kernels of the step."""
    step_ms, eager_ms, encode_ms = (1e3 * each["stats"]["median"] for each in (captured, eager, encode))
    info = captured["extra_info"]
    launches = sum(each["launches"] for each in info["kernels"])
    lines = [
        f"{captured['name']}: {step_ms:.3f} ms, eager {eager_ms:.3f} ms, its encoder alone {encode_ms:.3f} ms; "
        f"{launches:.0f} kernels, {info['kernels_us']:.0f} us in all"
    ]
    lines += [f"{each['us']:8.1f} us {each['launches']:5.1f} x  {each['kernel']}" for each in info["kernels"][:SHOWN]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=new_file, required=True, help="JSON file, rewritten after every result")
    parser.add_argument("--architectures", nargs="+", choices=SELECTING, default=list(SELECTING))
    parser.add_argument("--d-in", type=positive, default=1024)
    parser.add_argument("--d-sae", type=positive, default=65536)
    parser.add_argument("--rows", type=positive, default=4096, help="of a batch")
    parser.add_argument("--k", type=positive, default=20)
    parser.add_argument("--steps", type=positive, default=1000, help="of training before anything is timed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    results, chip = [], rates()
    print(", ".join(f"{value:.3g} {name}" for name, value in chip.items()), flush=True)
    for architecture in options.architectures:
        results += profile(architecture, chip, options)
        write_json_atomic(options.output, {"benchmarks": results})
        print(progress(*results[-3:]), flush=True)
        torch.cuda.empty_cache()
    captured = [each for each in results if each["extra_info"]["impl"] == "captured"]
    print(", ".join(f"{each['name']} {1e3 * each['stats']['median']:.3f} ms" for each in captured))


if __name__ == "__main__":
    main()
