"""A GPU's step of several ranks, as threads whose kernels the interpreter runs, against that of one process."""

from copy import deepcopy

import pytest
import torch
from launches import counted_launches
from test_sharded_step import check_state, kept_of, part_of
from turns import taking_turns

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.peers import Alone, Ranks
from saevlm_fast.training import choice, sharded_dead, sharded_gpu_step
from saevlm_fast.training.dead_latents import DeadBound, DeadLatents
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


class Told(Alone):
    """What a rank would tell the others, by kind."""

    def __init__(self):
        self.calls = []

    def gather(self, x):
        self.calls.append("gather")
        return super().gather(x)

    def exchange(self, x):
        self.calls.append("exchange")
        return super().exchange(x)

    def add_up(self, x):
        self.calls.append("add_up")
        return super().add_up(x)


@pytest.mark.parametrize(("architecture", "launches", "calls"), [("topk", 24, 4), ("batch_topk", 36, 7)])
def test_a_step_is_so_many_launches(monkeypatch, architecture, launches, calls):
    """Copies and fills included, what ranks tell each other counted apart; the device is not waited for."""
    monkeypatch.setattr("saevlm_fast.training.step.screens_cuda", lambda *_: True)
    stepper, peers = of_one_rank(architecture, dead_after=10_000_000)
    stepper.low.current()
    stepper.announce(3)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with counted_launches() as counts, torch.no_grad():
        stepper._gpu_step(x)
    assert sum(counts.values()) == launches, counts
    assert len(peers.calls) == calls, peers.calls
    assert not WAITS & counts.keys()


def of_one_rank(architecture, **settings):
    """A rank of one, and what it tells."""
    whole, peers = SAEConfig(8, 64, 1, architecture), Told()
    ranks = Ranks(peers, peers, Alone())
    shard = Shard.of(whole, ranks)
    sae = starting_sae(shard, 0, torch.device("cpu"))
    return ShardedStepper(sae, TrainConfig(steps=100, warmup_steps=0, **settings), shard, ranks), peers


WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_to_copy", "masked_select", "unique"}


@pytest.mark.parametrize("of_all", [None, 0, 3])
def test_a_step_asks_for_no_loss_of_dead_latents_that_no_rank_has(monkeypatch, of_all):
    """None: it is not known."""
    stepper, _ = of_one_rank("topk", dead_after=2)
    stepper.dead_bound.of_all = of_all
    stepper.announce(3)
    given, x = [], torch.randn(3, 8)

    def step(*args):
        given.extend(args[-3:])
        return x, None, 0

    monkeypatch.setattr(sharded_gpu_step, "sharded_gpu_step", step)
    stepper._gpu_step(x)
    dead, _, most_dead = given
    assert (dead is None) == (of_all == 0)
    assert most_dead == of_all


def test_the_loss_of_few_dead_latents_is_so_many_launches(monkeypatch):
    """Of a list with padding, all of which take part; the device is not waited for."""
    monkeypatch.setattr(sharded_dead, "on_gpu", lambda _: True)
    stepper, peers = of_one_rank("topk", dead_after=2)
    (x, x_hat), latents_A, number = torch.randn(2, 3, 8), torch.tensor([1, 7, 64, 64]), torch.tensor(2)
    with counted_launches() as counts, torch.no_grad():
        given = DeadLatents(latents_A, number), 0.5, 3, None, 4
        sharded_dead.shared_auxiliary(stepper.sae, stepper.ranks, x, x_hat, *given)
    assert sum(counts.values()) == 50, counts
    assert peers.calls == ["add_up", "exchange", "gather"]
    assert not WAITS & counts.keys()


def test_of_dead_latents_that_all_take_part_nothing_is_told(monkeypatch):
    """The same bits as by telling, of which as many calls are missing as there are digits; one rank has none."""
    monkeypatch.setattr(sharded_dead, "on_gpu", lambda _: True)
    alone, _, data = make("topk", d_in=12, d_sae=40, k=2, dead_after=10_000_000)
    x, dead = data[:9], [torch.tensor([3, 4, 17]), torch.tensor([20, 20])]

    def work(peers, most_dead):
        shard, calls = Shard(alone.sae.config, peers.rank, 2), []
        add_up = peers.add_up
        peers.add_up = lambda counts: calls.append(len(counts)) or add_up(counts)
        given = DeadLatents(dead[peers.rank], torch.tensor(3 - 3 * peers.rank)), 0.5, len(x), None, most_dead
        found, n_dead = sharded_dead.shared_auxiliary(part_of(alone.sae, shard), Ranks.of(peers), x, x * 0.3, *given)
        return found, int(n_dead), len(calls)

    told, untold, at_the_limit = (taking_turns(2, lambda peers, n=n: work(peers, n)) for n in (None, 3, 6))
    for (one, n_dead, calls), others in zip(told, zip(untold, at_the_limit)):
        assert (n_dead, calls) == (3, 1 + 8)
        for other, n_other, n_calls in others:
            assert (n_other, n_calls) == (3, 1)
            first, second = ([a.loss, a.b_enc_A, a.W_enc.rows_AD, a.W_dec.rows_AD] for a in (one, other))
            assert all(torch.equal(*pair) for pair in zip(first, second))
    assert [bool(found.W_dec.rows_AD.any()) for found, _, _ in told] == [True, False]


@pytest.mark.parametrize("rows_of_block", [4, 2])
def test_more_dead_latents_than_take_part_are_chosen_as_on_a_cpu(monkeypatch, rows_of_block):
    """All of one rank's, the other's list has no places; rows in column-major order, in one block or several."""
    alone, _, data = make("topk", d_in=6, d_sae=40, k=2, dead_after=10_000_000)
    x, latents = data[:4].T.contiguous().T, torch.tensor([3, 4, 8, 11, 17])
    listed = DeadLatents(torch.cat([latents, torch.full((3,), 20)]), torch.tensor(5))

    def auxiliaries(dead, most_dead):
        def work(peers):
            sae = part_of(alone.sae, Shard(alone.sae.config, peers.rank, 2))
            given = DeadLatents(latents[:0], 0) if peers.rank else dead, 0.5, len(x), None, most_dead
            return sharded_dead.shared_auxiliary(sae, Ranks.of(peers), x, x * 0.3, *given)

        return taking_turns(2, work)

    expected = auxiliaries(DeadLatents(latents, 5), None)
    monkeypatch.setattr(sharded_dead, "on_gpu", lambda _: True)
    monkeypatch.setattr(sharded_dead, "_GPU_ELEMENTS", rows_of_block * len(listed.latents_A))
    for (a, n_dead), (b, n_expected) in zip(auxiliaries(listed, 8), expected):
        assert int(n_dead) == n_expected == 5
        n = len(b.b_enc_A)
        for one, other in ((a.W_enc.rows_AD, b.W_enc.rows_AD), (a.W_dec.rows_AD, b.W_dec.rows_AD)):
            torch.testing.assert_close(one[:n], other, rtol=1e-5, atol=1e-7)
            assert not one[n:].any()
        torch.testing.assert_close(a.b_enc_A[:n], b.b_enc_A, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=0)
    if rows_of_block == len(x):  # of several blocks each is first chosen from by itself
        untold = auxiliaries(listed, 3)[0][0]
        assert float(untold.loss) != pytest.approx(float(expected[0][0].loss), rel=1e-3), "some are not chosen"


@pytest.mark.parametrize(("architecture", "can_be"), [("topk", [True, False]), ("relu", [False, False])])
def test_a_ranks_step_can_be_captured_while_no_latent_can_be_dead(architecture, can_be):
    whole, ranks = SAEConfig(8, 64, None if architecture == "relu" else 1, architecture), Ranks.of(Alone())
    shard = Shard.of(whole, ranks)
    config = TrainConfig(steps=100, warmup_steps=0, dead_after=5)
    stepper = ShardedStepper(starting_sae(shard, 0, torch.device("cpu")), config, shard, ranks)
    found = []
    for _ in range(2):
        stepper.announce(3)
        found.append(stepper.can_be_captured(torch.zeros(3, 8)))
    assert found == can_be


def test_ranks_know_what_can_be_dead_of_all(monkeypatch):
    """The bounds hold at every step, in a list of few lengths; who has none knows of the others'."""

    class Arrival:
        def record(self): ...
        def synchronize(self): ...

    empty, after, n_rows = torch.empty, 300, 10
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **more: empty(*shape, **more))
    monkeypatch.setattr(torch.cuda, "Event", Arrival)
    generator = torch.Generator().manual_seed(0)
    fires = torch.rand(120, 2, 50, generator=generator) < 0.9
    fires[:, 0, :7] = False  # of the first rank some never do
    fires[70:, 0, 2:7] = True

    def work(peers):
        bound, alone, idle, found = DeadBound(peers.add_up), DeadBound(), torch.zeros(50, dtype=torch.int64), []
        for step, fired in enumerate(fires[:, peers.rank]):
            seen = (step + 1) * n_rows
            own, same = (each.latents(idle, n_rows, seen, after) if seen >= after else None for each in (bound, alone))
            assert own == same == alone.of_all
            idle = torch.where(fired, 0, idle + n_rows)
            found.append((own, bound.of_all, int((idle >= after).sum())))
        return found

    first, second = taking_turns(2, work)
    assert first[28][:2] == second[28][:2] == (None, None)
    for (own, of_all, n_dead), (other, same, none) in zip(first[29:], second[29:]):
        assert n_dead <= own
        assert none == other == 0
        assert of_all == same == own
    assert [of_all for _, of_all, _ in first].count(7) > 40
    assert first[-1][1] == 2
