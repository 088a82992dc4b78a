"""Small training runs, in this process and as a command of their own."""

import time

import pytest
import torch
from forked import Forked

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig, group_sizes_from_fractions
from saevlm_fast.data.rows import open_activations
from saevlm_fast.training.checkpoints import checkpoints
from saevlm_fast.training.run import train
from saevlm_fast.training.step import Stepper

D_IN, D_SAE, K = 32, 128, 6


def sae_config(architecture="batch_topk"):
    groups = group_sizes_from_fractions((0.25, 0.25, 0.5), D_SAE) if architecture == "matryoshka" else ()
    return SAEConfig(D_IN, D_SAE, K, architecture, groups)


def run(matrix, output, architecture="batch_topk", *, options=None, validation=None, **settings):
    config = TrainConfig(**{"steps": 60, "batch_size": 256, "lr": 3e-3, "seed": 1} | settings)
    options = RunOptions(output, "cpu", **({"log_every": 20, "checkpoint_every": 25} | (options or {})))
    return train(open_activations(matrix), sae_config(architecture), config, options, validation=validation)


WORDS = ("train", "--device", "cpu", "--d-sae", 128, "--k", 6, "--steps", 150, "--batch-size", 256, "--lr", 3e-3,
         "--checkpoint-every", 10, "--log-every", 5, "--dead-after", 5000)  # fmt: skip


def start(matrix, output, *more, slow_from=150):
    """The command, at work in a process of its own; from that step on as slowly as if it waited to be ended."""
    words = (*WORDS, "--activations", matrix, "--output", output, *more)
    process = Forked(words, output.with_name(f"{output.name}.log"))
    device_step = Stepper.device_step

    def slower(stepper, *given):
        if stepper.n_steps > slow_from:
            time.sleep(0.5)
        return device_step(stepper, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "device_step", slower)
        process.start()
    return process


def wait_for_checkpoint(process, output, n_steps):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if any(int(p.name[5:]) >= n_steps for p in checkpoints(output)):
            return
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint: {process.end(0)}")


def weights(output):
    return (output / "sae_weights.safetensors").read_bytes()


class Stopped(Exception):
    pass


def stop_at(step):
    def on_step(now):
        if now == step:
            raise Stopped

    return on_step


def same_weights(one, other):
    """Of two SAEs, to the bit."""
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
