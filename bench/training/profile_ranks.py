"""The step of a rank on a GPU beside that of one process: `torchrun ... -m bench.training.profile_ranks`.

One rank runs the code of many, without traffic. Of each architecture, without dead latents and with some that are made
weak (ranks_on_gpus.py), are printed: the step of one process, the rank's, and the time in which the host issues it.
Then, of all cases, where the host waits for the device, and the kernels: after torch's profiler a process launches
slower for as long as it lives (CUPTI stays). Arguments: architectures, no-dead or dead, and `capture`, which also takes
the rank's steps in a CUDA graph while none can be dead. As in profile_step.py, the step size is set to next to nothing
before anything is timed.
"""

import dataclasses
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.training.profile_step import NO_STEP, kernels
from bench.training.ranks_on_gpus import DEAD_AFTER, WEAK, weaken
from saevlm_fast.config import SELECTING, SAEConfig, TrainConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.capture import CapturedSteps
from saevlm_fast.training.process_group import MeshPeers, joined, own_device
from saevlm_fast.training.sharded_step import ShardedStepper
from saevlm_fast.training.shards import Shard, starting_sae
from saevlm_fast.training.step import Stepper

D_IN, D_SAE, K, ROWS = 1024, 16384, 20, 4096
STEPS, ROUNDS, REPEATS, SHOWN, N_BATCHES = 30, 5, 8, 60, 4
NEVER = 10**9


def batches_of(planted: bool, device: torch.device) -> list[Tensor]:
    """Rows of eight concepts among 2 d_in, or noise, of mean square norm 1."""
    generator = torch.Generator(device).manual_seed(0)
    shape = N_BATCHES * ROWS, 2 * D_IN if planted else D_IN
    x_ND = torch.randn(shape, device=device, generator=generator)
    if planted:
        concepts = torch.randn(2 * D_IN, D_IN, device=device, generator=generator)
        x_ND = x_ND.abs().mul_(torch.rand(shape, device=device, generator=generator) < 8 / (2 * D_IN)) @ concepts
    return list((x_ND / x_ND.square().sum(1).mean().sqrt()).split(ROWS))


def milliseconds(call: Callable[[], object]) -> tuple[float, float]:
    """(by the device's clock, of the host alone) a call, the median of some rounds."""
    device, host = [], []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        begun = time.perf_counter()
        for _ in range(REPEATS):
            call()
        host.append(1e3 * (time.perf_counter() - begun) / REPEATS)
        end.record()
        end.synchronize()
        device.append(start.elapsed_time(end) / REPEATS)
    return statistics.median(device), statistics.median(host)


def waits(call: Callable[[], object]) -> list[str]:
    """Where the host waits for the device in one call."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        call()
    torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename.split('/')[-1]}:{each.lineno}" for each in met if "synchron" in str(each.message)]


def steppers(architecture: str, dead_after: int, device: torch.device, peers: MeshPeers) -> dict[str, Stepper]:
    """Of one process, and the rank's, both as some steps have left them."""
    whole = SAEConfig.sized(D_IN, d_sae=D_SAE, k=K, architecture=architecture)  # type: ignore[arg-type]
    config = TrainConfig(steps=1000, batch_size=ROWS, warmup_steps=0, dead_after=dead_after, threshold_start=0)
    sae, shard = SparseAutoencoder(whole, device=device), Shard.of(whole, peers.ranks)
    sae.reset_parameters(0)
    parts = starting_sae(shard, 0, device)
    if dead_after < NEVER:
        weaken(sae, 0, WEAK[architecture])
        weaken(parts, shard.start, WEAK[architecture])
    return {"one process": Stepper(sae, config), "a rank": ShardedStepper(parts, config, shard, peers.ranks, ROWS)}


def timed(
    architecture: str, dead_after: int, batches: list[Tensor], peers: MeshPeers, capture: bool
) -> dict[str, Callable[[], object]]:
    """The rank's step, to be profiled, by the name of the case."""
    ways: dict[str, Callable[[], object]] = {}
    found = steppers(architecture, dead_after, batches[0].device, peers)
    for name, stepper in found.items():
        stepper.sae.b_dec.data.copy_(batches[0].mean(0))
        for step in range(STEPS):
            output = stepper.step(batches[step % N_BATCHES])
        stepper.config = dataclasses.replace(stepper.config, lr=NO_STEP)
        way = lambda stepper=stepper: stepper.step(batches[0])  # noqa: E731
        device, host = milliseconds(way)
        output = way()
        case = f"{architecture}, {int(output.n_dead)} dead of {stepper.n_listed} listed, {name}"
        print(f"=== {case}: {device:.3f} ms, host {host:.3f} ms, loss {float(output.losses.overall):.6f}", flush=True)
        if name == "a rank":
            ways[case] = way
        if capture and name == "a rank" and dead_after == NEVER:
            steps = CapturedSteps(stepper)
            for _ in range(4):
                steps.step(batches[0])
            held_BD = steps.input(ROWS)
            assert held_BD is not None  # as steps are captured
            device, host = milliseconds(partial(steps.step, held_BD))
            kept = f"{steps.n_captured} graphs, {steps.n_replayed} replayed, {steps.n_eager} eager"
            print(f"=== {case}, captured: {device:.3f} ms, host {host:.3f} ms; {kept}", flush=True)
    one, other = (stepper.sae.W_dec for stepper in found.values())
    print(f"W_dec differs by {float((one - other).detach().abs().max()):.1e} at most", flush=True)
    return ways


def show(found: list[dict]) -> None:
    launches, total = (sum(each[name] for each in found) for name in ("launches", "us"))
    print(f"{launches:.0f} launches, {total:.0f} us")
    for each in found[:SHOWN]:
        print(f"{each['us']:9.1f} us {each['launches']:5.1f} x  {each['kernel']}")


def main() -> None:
    device, chosen = torch.device(own_device("cuda")), sys.argv[1:]
    architectures = [each for each in SELECTING if each in chosen] or list(SELECTING)
    with joined(device, 60) as peers:
        cases = {"no-dead": (NEVER, batches_of(True, device)), "dead": (DEAD_AFTER, batches_of(False, device))}
        ways: dict[str, Callable[[], object]] = {}
        for architecture in architectures:
            for dead_after, batches in [cases[each] for each in cases if each in chosen] or cases.values():
                ways |= timed(architecture, dead_after, batches, peers, "capture" in chosen)
        for case, way in ways.items():
            print(f"--- {case}: host waits {waits(way)}", flush=True)
            show(kernels(way))


if __name__ == "__main__":
    main()
