"""The step of several ranks, as threads, against that of one process."""

from copy import deepcopy

import pytest
import test_penalised_step
import torch
from thread_peers import together

from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.training import sharded_dead
from saevlm_fast.training.dead_latents import DeadLatents
from saevlm_fast.training.mono import Embeddings, MonoTerm
from saevlm_fast.training.sharded_dead import shared_auxiliary
from saevlm_fast.training.sharded_mono import SharedMono
from saevlm_fast.training.sharded_rows import kept_entries
from saevlm_fast.training.sharded_step import ShardedStepper
from saevlm_fast.training.shards import Shard, cut
from saevlm_fast.training.step import Stepper
from test_step import make


def part_of(whole, shard):
    """The shard's latents of a whole SAE."""
    part = SparseAutoencoder(shard.config, dtype=whole.W_dec.dtype, random=False)
    rows = slice(shard.start, shard.stop)
    with torch.no_grad():
        part.threshold.copy_(whole.threshold[rows] if whole.threshold.ndim else whole.threshold)
        part.W_enc.T.copy_(whole.W_enc.T[rows])
        part.W_dec.copy_(whole.W_dec[rows])
        part.b_enc.copy_(whole.b_enc[rows])
        part.b_dec.copy_(whole.b_dec)
    return part


def run_sharded(whole, config, batches, world, by_blocks=None, replicas=1):
    """[(losses, dead latents, latents kept, x_hat) of every step, stepper] of every rank; and what was told."""

    def work(peers):
        shard = Shard.of(whole.config, peers.ranks)
        stepper = ShardedStepper(part_of(whole, shard), config, shard, peers.ranks, len(batches[0]))
        stepper.by_blocks = stepper.by_blocks if by_blocks is None else by_blocks
        steps = []
        for x in batches:
            rows = cut(len(x), replicas)[shard.replica]
            output = stepper.step(x[rows])
            codes = output.codes.compact()
            kept = torch.stack([codes.entry_rows() + rows.start, codes.top_indices + shard.start])
            losses = torch.stack([each for each in output.losses if each is not None])
            steps.append((losses, output.n_dead, kept, output.x_hat_BD))
        return steps, stepper

    return together(world, work, replicas)


def kept_of(codes):
    codes = codes.compact()
    return torch.stack([codes.entry_rows(), codes.top_indices])


NEVER = 10_000_000
# ranks, whether gradients are made block by block, replicas; and after how many rows a latent is dead
SHAPES = {
    "2, no dead": (2, None, 1, NEVER),
    "2": (2, None, 1, 150),
    "3": (3, None, 1, 150),
    "3 whole": (3, False, 1, 150),
    "2 replicas": (2, None, 2, 150),
    "2 replicas of 2, no dead": (4, None, 2, NEVER),
    "3 replicas of 2": (6, None, 3, 150),
}


@pytest.mark.parametrize(("world", "by_blocks", "replicas", "dead_after"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_same_choice_losses_and_weights_as_one_process(architecture, world, by_blocks, replicas, dead_after):
    """97 latents and 61 rows, which neither 2 nor 3 divide; Matryoshka groups that are cut. Float64 over 9 steps."""
    alone, _, data = make(architecture, dead_after=dead_after, dtype=torch.float64)
    start, batches, n_dead = deepcopy(alone.sae), data[: 9 * 61].split(61), []
    ranks, _ = run_sharded(start, alone.config, batches, world, by_blocks, replicas)
    for number, x in enumerate(batches):
        output = alone.step(x)
        for steps, _ in ranks:
            losses, dead, _, _ = steps[number]
            torch.testing.assert_close(losses, torch.stack(output.losses[:3]), atol=1e-11, rtol=1e-11)
            assert dead == output.n_dead
        x_hat = torch.cat([steps[number][3] for steps, _ in ranks[:: world // replicas]])
        torch.testing.assert_close(x_hat, output.x_hat_BD, atol=1e-11, rtol=1e-11)
        kept = torch.cat([steps[number][2] for steps, _ in ranks], dim=1)
        order = (kept[0] * 1000 + kept[1]).argsort()
        assert torch.equal(kept[:, order], kept_of(output.codes))
        n_dead.append(output.n_dead)
    assert (max(n_dead) > 0) == (dead_after == 150)
    check_state([stepper for _, stepper in ranks], alone, 1e-10)


def check_state(steppers, alone, tolerance):
    """Weights, moments and counters of all ranks are those of one process; replicas have the same bits."""
    by_latents = sorted(steppers, key=lambda each: each.shard.owned)
    for name, parameter in alone.parameters().items():
        for index in range(3):
            found = [(each.parameters()[name], *each.moments[name])[index] for each in by_latents]
            wanted = (parameter, *alone.moments[name])[index]
            if name == "b_dec":
                assert all(torch.equal(each, found[0]) for each in found), "ranks differ"
            whole = found[0] if name == "b_dec" else torch.cat(found)
            torch.testing.assert_close(whole, wanted, atol=tolerance, rtol=tolerance)
    n_parts = steppers[0].shard.world
    for each, other in zip(steppers[n_parts:], steppers):
        found, wanted = ({"idle": one.idle_S, **one.sae.state_dict()} for one in (each, other))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), "replicas differ"
    assert torch.equal(torch.cat([each.idle_S for each in steppers[:n_parts]]), alone.idle_S)
    for each in steppers if alone.sae.threshold.ndim == 0 else []:
        torch.testing.assert_close(each.sae.threshold, alone.sae.threshold, atol=1e-6, rtol=1e-6)
        assert torch.equal(each.sae.threshold, steppers[0].sae.threshold)


@pytest.mark.parametrize(("world", "by_blocks", "replicas"), [(2, None, 1), (4, None, 2)])
@pytest.mark.parametrize("dead_after", [10_000_000, 150], ids=["no-dead", "auxk"])
@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_penalised_saes_are_those_of_one_process(architecture, dead_after, world, by_blocks, replicas):
    """Half of the latents fire at first. Float64 over 9 steps; penalties, and thresholds that ranks share out."""
    alone, _, data = test_penalised_step.make(architecture, dead_after=dead_after)
    batches = data[: 9 * 61].split(61)
    ranks, _ = run_sharded(deepcopy(alone.sae), alone.config, batches, world, by_blocks, replicas)
    for number, x in enumerate(batches):
        losses = alone.step(x).losses
        for steps, _ in ranks:
            torch.testing.assert_close(steps[number][0], torch.stack(losses[:4]), atol=1e-11, rtol=1e-11)
    check_state([stepper for _, stepper in ranks], alone, 1e-10)
    means, _ = together(world, lambda peers: told_by(ranks[peers.rank][1], peers).mean_threshold(), replicas)
    assert means == [pytest.approx(float(alone.mean_threshold()), rel=1e-6)] * world


def told_by(stepper, peers):
    """The stepper among other peers: those of its run have parted."""
    stepper.ranks = peers.ranks
    return stepper


@pytest.mark.parametrize(("world", "replicas"), [(3, 1), (4, 2)])
def test_only_the_largest_dead_latents_of_all_ranks_take_part(monkeypatch, world, replicas):
    """More dead latents than d_in / 2, on some ranks, a few rows to a block; a learning rate that moves them."""
    monkeypatch.setattr(sharded_dead, "_BLOCK_ELEMENTS", 1000)
    alone, _, data = make("batch_topk", d_sae=301, k=2, dead_after=61, auxk_alpha=0.5, dtype=torch.float64)
    batches = data[: 9 * 61].split(61)
    ranks, _ = run_sharded(deepcopy(alone.sae), alone.config, batches, world, replicas=replicas)
    for x in batches:
        output = alone.step(x)
    assert output.n_dead > x.shape[1]
    check_state([stepper for _, stepper in ranks], alone, 1e-10)


@pytest.mark.parametrize("architecture", ["topk", "matryoshka"])
def test_float32_and_a_shard_of_fewer_latents_than_k(architecture):
    groups = (2, 5) if architecture == "matryoshka" else ()
    sae = SparseAutoencoder(SAEConfig(6, 7, 4, architecture, groups))
    config = TrainConfig(steps=20, lr=1e-3, warmup_steps=0, threshold_start=3)
    alone, data = Stepper(deepcopy(sae), config), torch.randn(20, 16, 6, generator=torch.Generator().manual_seed(0))
    ranks, _ = run_sharded(sae, config, data, 3)
    for x in data:
        alone.step(x)
    check_state([stepper for _, stepper in ranks], alone, 1e-5)


SETTINGS = {
    "micro-batches": ("matryoshka", {"accumulate": 4}, 4, 2),
    "of topk": ("topk", {"accumulate": 3}, 3, 1),
    "of jumprelu": ("jumprelu", {"accumulate": 3}, 4, 2),
    "of relu": ("relu", {"accumulate": 2}, 3, 1),
    "frozen decoder": ("batch_topk", {"control": "frozen-decoder"}, 3, 1),
    "frozen encoder": ("topk", {"control": "frozen-encoder"}, 3, 1),
    "frozen decoder, replicas": ("batch_topk", {"control": "frozen-decoder"}, 4, 2),
    "soft-frozen": ("matryoshka", {"control": "soft-frozen", "control_cosine": 0.99, "lr": 0.05}, 3, 1),
    "soft-frozen, replicas": ("topk", {"control": "soft-frozen", "control_cosine": 0.99, "lr": 0.05}, 4, 2),
    "MonoLoss": ("batch_topk", {"mono_weight": 0.5}, 3, 1),
    "MonoLoss of jumprelu": ("jumprelu", {"mono_weight": 0.5}, 2, 1),
    "MonoLoss of replicas": ("matryoshka", {"mono_weight": 0.5}, 6, 3),
    "MonoLoss of jumprelu, replicas": ("jumprelu", {"mono_weight": 0.5}, 2, 2),
}


@pytest.mark.parametrize(("architecture", "more", "world", "replicas"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_of_one_process_are_those_of_ranks(architecture, more, world, replicas):
    """Float64 over 5 steps, with dead latents from the third."""
    of = test_penalised_step.make if architecture in ("relu", "jumprelu") else make
    dtype = {} if of is test_penalised_step.make else {"dtype": torch.float64}
    alone, _, data = of(architecture, dead_after=150, **dtype, **more)
    batches, start = data[: 5 * 61].split(61), deepcopy(alone.sae)
    ranks, _ = run_sharded(start, alone.config, batches, world, replicas=replicas)
    for number, x in enumerate(batches):
        wanted = torch.stack([loss for loss in alone.step(x).losses if loss is not None])
        for steps, _ in ranks:
            torch.testing.assert_close(steps[number][0], wanted, atol=1e-11, rtol=1e-11)
    steppers = [stepper for _, stepper in ranks]
    check_state(steppers, alone, 1e-10)
    for name in ("W_enc", "W_dec"):
        moved = not torch.equal(getattr(alone.sae, name), getattr(start, name))
        assert moved == (alone.config.frozen != name)
    if alone.cone is not None:
        cosines = (alone.cone.rows_SD * alone.sae.W_dec).sum(1)
        assert (cosines < 0.9901).any(), "nothing was held"


def test_the_learning_rate_is_that_of_the_whole_sae():
    alone, _, data = make("topk", lr=None, d_sae=970, warmup_steps=0, dtype=torch.float64)
    ranks, _ = run_sharded(deepcopy(alone.sae), alone.config, [data[:61]], 3)
    alone.step(data[:61])
    check_state([stepper for _, stepper in ranks], alone, 1e-10)
    assert {stepper.learning_rate() for _, stepper in ranks} == {alone.learning_rate()}


def test_entries_in_fixed_places_are_the_same():
    """As a GPU has them: padding at the end, which belongs to no row."""
    generator = torch.Generator().manual_seed(0)
    x, sae = torch.randn(20, 24, generator=generator), make("batch_topk")[0].sae.train()
    codes = sae.encode(x)
    mask = torch.rand(len(codes.top_acts), generator=generator) < 0.4
    plain, fixed = (kept_entries(codes, mask, fixed=fixed) for fixed in (False, True))
    assert len(plain.top_acts) < len(fixed.top_acts) == len(codes.top_acts)
    for one, other in zip(plain.csr(), fixed.compact().csr()):
        assert torch.equal(one, other)


def test_padded_entries_have_no_part_in_the_scores_of_replicas():
    """A GPU's entries end in padding, here of numbers that would be seen."""
    x, sae = torch.randn(21, 24, generator=torch.Generator().manual_seed(0)), make("batch_topk")[0].sae.train()
    term = MonoTerm(Embeddings.of(x), 0.5)

    def work(peers, padding):
        codes = sae.encode(x[cut(21, 2)[peers.rank]])
        acts, latents, offsets = codes.compact().csr()
        more = acts.new_full((padding * (peers.rank + 1),), 7.0), latents.new_zeros(padding * (peers.rank + 1))
        codes = SparseCodes.from_flat(torch.cat([acts, more[0]]), torch.cat([latents, more[1]]), offsets, 97)
        mono = SharedMono(term, peers.ranks.rows, [10, 11]).of_entries(codes, codes.by_latent())
        return mono.loss, mono.of_acts_M[: len(acts)]

    plain, padded = (together(2, lambda peers, n=n: work(peers, n), 2)[0] for n in (0, 5))
    torch.testing.assert_close(padded, plain)
    assert plain[0][1].any()


def test_padded_dead_latents_change_nothing_on_any_rank():
    """A GPU's list of dead latents ends in padding, and its number is on the device; of 3 ranks one has none."""
    alone, _, data = make("topk", d_sae=90, dtype=torch.float64)
    x, dead = data[:61], [torch.arange(1, 28, 2), torch.arange(0), torch.arange(30)]

    def work(peers, padding):
        shard = Shard(alone.sae.config, peers.rank, 3)
        latents_A, number = dead[peers.rank], len(dead[peers.rank])
        if padding:
            latents_A, number = torch.cat([latents_A, torch.full((5,), 30)]), torch.tensor(number)
        listed = DeadLatents(latents_A, number)
        return shared_auxiliary(part_of(alone.sae, shard), peers.ranks, x, x * 0.3, listed, 0.5, len(x))[0]

    plain, padded = (together(3, lambda peers, p=p: work(peers, p))[0] for p in (False, True))
    for rank, (one, other) in enumerate(zip(plain, padded)):
        n = len(dead[rank])
        torch.testing.assert_close(one.loss, other.loss)
        for first, second in ((one.W_enc, other.W_enc), (one.W_dec, other.W_dec)):
            torch.testing.assert_close(second.rows_AD[:n], first.rows_AD)
            assert not second.rows_AD[n:].any()
    assert any(each.W_enc.rows_AD.any() for each in plain)


def test_a_run_is_the_same_bits_again():
    alone, _, data = make("matryoshka", dead_after=150)
    first, second = (run_sharded(alone.sae, alone.config, data[: 8 * 61].split(61), 3)[0] for _ in range(2))
    for (_, one), (_, other) in zip(first, second):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters().values(), other.parameters().values()))


def test_nan_names_the_first_bad_step_on_every_rank():
    alone, _, data = make("batch_topk")
    batches = [*data[: 2 * 61].split(61), torch.full((61, 24), torch.nan), data[:61]]
    ranks, _ = run_sharded(alone.sae, alone.config, batches, 2)
    assert [int(stepper.bad_step) for _, stepper in ranks] == [2, 2]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_what_is_told_is_what_the_formula_says(architecture, replicas):
    """Bytes a rank receives in a step, by docs/how-to/many-gpus.md. Of one replica they do not grow with d_sae."""
    n_rows, d_in, k, parts, n_steps = 32, 24, 4, 2, 2
    world, own_rows, told = parts * replicas, n_rows // replicas, []
    for d_sae in (64, 1024):
        groups = (d_sae // 8, d_sae // 8, d_sae * 3 // 4) if architecture == "matryoshka" else ()
        sae = SparseAutoencoder(SAEConfig(d_in, d_sae, k, architecture, groups))
        data = torch.randn(n_steps, n_rows, d_in, generator=torch.Generator().manual_seed(0))
        _, meeting = run_sharded(sae, TrainConfig(steps=10, clip_norm=1e6), data, world, replicas=replicas)
        offers = (parts - 1) * own_rows * k * 4
        if architecture != "topk":
            offers = 3 * 2 * (world - 1) / world * 2048 * 4
        residuals = (parts - 1) / parts * own_rows * d_in * (3 if architecture == "matryoshka" else 1) * 4
        expected = offers + 2 * residuals + (world - 1) * (d_in + 2) * 4
        others, part = (replicas - 1) / replicas, d_sae / parts
        expected += 2 * others * part * (2 * d_in + 1) * 4 + 2 * others * part * 4
        told.append(sum(meeting.bytes[0].values()))
        for of_rank in meeting.bytes:
            assert sum(of_rank.values()) == n_steps * expected
    assert (told[0] == told[1]) == (replicas == 1)


def test_a_replica_keeps_moments_of_its_slice_alone():
    alone, _, data = make("topk")
    ranks, _ = run_sharded(deepcopy(alone.sae), alone.config, [data[:61]], 4, replicas=2)
    sizes = [len(stepper.moments["W_enc"][0]) for _, stepper in ranks]
    assert sizes == [24, 24, 24, 25]
    assert [len(stepper.sae.W_dec) for _, stepper in ranks] == [48, 49, 48, 49]
