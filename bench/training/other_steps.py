"""Training steps of every other kind: `python -m bench.training.other_steps --output FILE.json`.

Controls (frozen decoder, frozen encoder, soft-frozen decoder), MonoLoss, micro-batches, dead latents, and the SAEs of a
penalty. Each is stepped as `train` steps it, by CUDA graphs where that can be; its time is a median of rounds of steps
by the clock, the device waited for. A kind fails if its loss is not finite, if what must not move has moved, if what
must has not, or if steps on a GPU were not captured; the others go on, and the exit status is 1.
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.helpers import cases
from bench.helpers.arguments import positive
from bench.training.profile_step import planted_batches
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.errors import require
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.capture import CapturedSteps
from saevlm_fast.training.step import Stepper

ROUNDS, STEPS = 5, 10
RESTS = {"frozen-decoder": "W_dec", "frozen-encoder": "W_enc"}


class Kind(NamedTuple):
    """An architecture, and settings of its training."""

    architecture: str
    train: dict[str, Any]


KINDS = {
    "frozen-decoder": Kind("topk", {"control": "frozen-decoder"}),
    "frozen-encoder": Kind("topk", {"control": "frozen-encoder"}),
    "soft-frozen": Kind("topk", {"control": "soft-frozen"}),
    "MonoLoss": Kind("batch_topk", {"mono_weight": 1e-2}),
    "dead latents": Kind("batch_topk", {"dead_after": 1}),
    "4 micro-batches": Kind("topk", {"accumulate": 4}),
    "relu": Kind("relu", {"l1": 1e-2}),
    "jumprelu": Kind("jumprelu", {"target_l0": 20.0}),
}


def made(kind: Kind, mean_D: Tensor, options: argparse.Namespace) -> Stepper:
    """With weights of seed 0, and b_dec where `train` begins: else all rows soon have the same latents."""
    config = SAEConfig.sized(options.d_in, d_sae=options.d_sae, architecture=kind.architecture)  # type: ignore[arg-type]
    sae = SparseAutoencoder(config)
    sae.reset_parameters(0)
    sae.b_dec.data.copy_(mean_D)
    train = {"steps": 1000, "batch_size": options.rows, "warmup_steps": 0, "dead_after": 10**9} | kind.train
    return Stepper(sae.to(options.device), TrainConfig(**train))


def timed(steps: CapturedSteps, batches: list[Tensor], device: torch.device) -> list[float]:
    """Of each of ROUNDS rounds of STEPS steps, a step's mean seconds."""
    seconds = []
    for _ in range(ROUNDS):
        _wait(device)
        start = time.perf_counter()
        for step in range(STEPS):
            steps.step(batches[step % len(batches)])
        _wait(device)
        seconds.append((time.perf_counter() - start) / STEPS)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(name: str, batches: list[Tensor], options: argparse.Namespace) -> list[float]:
    """Seconds of each of ROUNDS rounds. ValueError: what is wrong with the steps."""
    kind = KINDS[name]
    stepper = made(kind, batches[0].mean(0), options)
    before = {key: parameter.clone() for key, parameter in stepper.parameters().items()}
    steps = CapturedSteps(stepper)
    for step in range(2 * STEPS):
        output = steps.step(batches[step % len(batches)])
    loss = float(output.losses.overall)
    require(bool(torch.isfinite(output.losses.overall)), f"{name}: the loss is {loss} after {2 * STEPS} steps")
    require(int(stepper.bad_step) < 0, f"{name}: step {int(stepper.bad_step)} was the first whose loss was not finite")
    for key in ("W_enc", "W_dec"):
        moved, rests = not torch.equal(before[key], stepper.parameters()[key]), RESTS.get(name) == key
        require(moved != rests, f"{name}: {key} {'has moved' if moved else 'has not moved'}")
    done = steps.n_replayed
    seconds = timed(steps, batches, stepper.idle_S.device)
    if options.device == "cuda":
        expected, replayed = ROUNDS * STEPS, steps.n_replayed - done
        # Dead latents come and go: a graph of another length is captured after two eager steps.
        fits = replayed >= expected // 2 if "dead_after" in kind.train else replayed == expected
        require(fits, f"{name}: {replayed} of {expected} steps were replayed")
    print(f"{name}: {1e3 * statistics.median(seconds):.3f} ms, loss {loss:.4g}", flush=True)
    return seconds


def result(name: str, seconds: list[float], options: argparse.Namespace) -> dict:
    shape = {"B": options.rows, "d_in": options.d_in, "d_sae": options.d_sae}
    info = {"operation": f"training step, {name}", "case": f"d_sae {options.d_sae}", "dtype": "float32", "shape": shape}
    info |= {"impl": "captured" if options.device == "cuda" else "eager"}
    return cases.line(info, seconds, options.device)


def main() -> None:
    parser = cases.parser_of(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--d-in", type=positive, default=1024)
    parser.add_argument("--d-sae", type=positive, default=16384)
    parser.add_argument("--rows", type=positive, default=4096, help="of a batch")
    options = cases.parsed(parser)
    batches = planted_batches(options.rows, options.d_in, options.device)
    cases.run_all(
        options.kinds,
        partial(measured, batches=batches, options=options),
        partial(result, options=options),
        options.output,
        "kinds of steps passed",
    )


if __name__ == "__main__":
    main()
