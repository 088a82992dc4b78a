"""A GPU's step of several ranks, as threads whose kernels the interpreter runs, against that of one process."""

from copy import deepcopy

import pytest
import torch
from launches import counted_launches
from test_sharded_step import check_state, kept_of, part_of
from turns import taking_turns

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.peers import Alone, Ranks
from saevlm_fast.training import choice, sharded_gpu_step
from saevlm_fast.training.sharded_step import ShardedStepper
from saevlm_fast.training.shards import Shard, starting_sae
from test_step import make

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of the CPU: only the interpreter takes them")


def run_ranks(whole, config, batches, world):
    """[(losses, dead latents, latents kept, x_hat) of every step, stepper] of every rank."""

    def work(peers):
        shard = Shard.of(whole.config, Ranks.of(peers))
        stepper, steps = ShardedStepper(part_of(whole, shard), config, shard, Ranks.of(peers)), []
        for x in batches:
            stepper.announce(len(x))
            with torch.no_grad():
                mono = stepper._shared_mono(x, None)
                output = stepper._gpu_step(x, None if mono is None else mono.term)
            kept = kept_of(output.codes)
            kept[1] += shard.start
            losses = torch.stack([each for each in output.losses if each is not None])
            steps.append((losses, output.n_dead, kept, output.x_hat_BD))
        return steps, stepper

    return taking_turns(world, work)


def compare(alone, data, n_steps, rows, world):
    """Every step of the ranks is that of one process on a CPU."""
    batches = data[: n_steps * rows].split(rows)
    ranks, n_dead = run_ranks(deepcopy(alone.sae), alone.config, batches, world), []
    for number, x in enumerate(batches):
        output = alone.step(x)
        wanted = torch.stack([loss for loss in output.losses if loss is not None])
        for steps, _ in ranks:
            losses, dead, _, x_hat = steps[number]
            torch.testing.assert_close(losses, wanted, atol=1e-10, rtol=1e-10)
            assert dead == output.n_dead
            torch.testing.assert_close(x_hat, output.x_hat_BD, atol=1e-10, rtol=1e-10)
        kept = torch.cat([steps[number][2] for steps, _ in ranks], dim=1)
        order = (kept[0] * 1000 + kept[1]).argsort()
        assert torch.equal(kept[:, order], kept_of(output.codes))
        n_dead.append(output.n_dead)
    check_state([stepper for _, stepper in ranks], alone, 1e-10)
    return n_dead


SIZES = {"d_in": 6, "d_sae": 9, "k": 2}
SOFT = {"control": "soft-frozen", "control_cosine": 0.99, "lr": 0.05}
# settings, ranks, rows of a batch
CASES = {
    "topk, dead": ("topk", {"dead_after": 5, "d_sae": 13, "k": 1}, 2, 5),
    "matryoshka, dead": ("matryoshka", {"dead_after": 7, "d_sae": 13, "k": 1, "groups": (1, 2, 10)}, 3, 7),
    "more offers than are told, frozen encoder": ("topk", {"control": "frozen-encoder"}, 2, 5),
    "frozen decoder": ("topk", {"control": "frozen-decoder"}, 2, 5),
    "soft-frozen, MonoLoss": ("batch_topk", SOFT | {"mono_weight": 0.5}, 2, 5),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_one_process(monkeypatch, case):
    """Rows that the ranks do not divide, Matryoshka groups that are cut. Float64, 2 steps."""
    architecture, more, world, rows = CASES[case]
    if "more offers" in case:
        monkeypatch.setattr(sharded_gpu_step, "FEW_OFFERS", 3)
        monkeypatch.setattr(choice, "FEW_OFFERS", 3)
    given = {"dead_after": 10_000_000, "dtype": torch.float64} | SIZES | more
    alone, _, data = make(architecture, **given)
    n_dead = compare(alone, data, 2, rows, world)
    assert (max(n_dead) > 0) == ("dead" in case)


@pytest.mark.parametrize(("architecture", "most"), [("topk", 24), ("batch_topk", 36)])
def test_a_step_is_so_many_launches(monkeypatch, architecture, most):
    """Copies and fills included, what ranks tell each other not."""
    monkeypatch.setattr("saevlm_fast.training.step.screens_cuda", lambda *_: True)
    whole = SAEConfig(8, 64, 1, architecture)
    ranks = Ranks.of(Alone())
    shard = Shard.of(whole, ranks)
    sae = starting_sae(shard, 0, torch.device("cpu"))
    stepper = ShardedStepper(sae, TrainConfig(steps=100, warmup_steps=0), shard, ranks)
    stepper._low_W_enc()
    stepper.announce(3)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with counted_launches() as counts, torch.no_grad():
        stepper._gpu_step(x)
    assert sum(counts.values()) == most, counts
