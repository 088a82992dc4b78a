"""Steerability against transformers' own forward with the steering hook, and each formula against loops."""

import numpy as np
import pytest
import torch

from saevlm_fast.box.models import model_directory
from saevlm_fast.box.scenes import value_prompts
from saevlm_fast.clip_steering.run import Asking, spread
from saevlm_fast.clip_steering.screening import screened
from saevlm_fast.clip_steering.steerability import (
    NEAREST,
    ReferenceSums,
    Steering,
    _quantiles,
    chances,
    nearest_in_density,
)
from saevlm_fast.clip_steering.stream import Vocabulary, opened_stream
from saevlm_fast.clip_steering.units import Latents, Neurons
from saevlm_fast.config import SAEConfig, SteerabilityConfig
from saevlm_fast.images.open import open_images
from saevlm_fast.measures.parts import Parts
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.edits import clamp, scale, steer
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.text import load_text_encoder

LAYER, N = 2, 5


@pytest.fixture(scope="module")
def tower():
    return load_tower(f"hf:{model_directory('tiny-clip')}", "cpu")


@pytest.fixture(scope="module")
def vocabulary():
    encoder = load_text_encoder(f"hf:{model_directory('tiny-clip')}", "cpu")
    words = value_prompts("shape") + value_prompts("background")
    return Vocabulary(tuple(words), encoder.embed(words), encoder.logit_scale)


@pytest.fixture(scope="module")
def source():
    return open_images(f"scenes:test:{N}")


def random_sae(input_norm="none"):
    sae = SparseAutoencoder(SAEConfig(128, 40, 6, "topk", input_norm=input_norm)).eval()
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    return sae


@pytest.fixture
def stream(tower):
    with opened_stream(tower, LAYER, "patches", 3) as found:
        yield found


@torch.no_grad()
def probabilities(tower, source, vocabulary, i):
    inputs = tower.preprocess([decoded(source, i)])
    out = tower.model(pixel_values=tower._normalisation(inputs["pixel_values"])).image_embeds[0].double()
    logits = vocabulary.logit_scale * (vocabulary.texts_CE.double() @ (out / out.norm()))
    return logits.softmax(0)


def moved_probabilities(tower, source, vocabulary, i, sae, edit):
    with steer(tower.model, sae, LAYER, [edit], tokens="patches", error="drop"):
        return probabilities(tower, source, vocabulary, i)


def decoded(source, i):
    from saevlm_fast.images.decode import decode

    return decode(source.read(i))


@pytest.mark.parametrize("input_norm", ["none", "layer_norm"])
def test_latents_as_the_steering_hook_moves_them(tower, vocabulary, source, input_norm):
    sae, moved, target = random_sae(input_norm), [3, 17, 30], torch.tensor([2.0, 0.5, 4.0])
    with opened_stream(tower, LAYER, "patches", 3) as stream:
        steering = Steering(stream, list(stream.batches(source, range(N))), Latents(sae), vocabulary)
        found = steering.changes(torch.tensor(moved), target)
    before = torch.stack([probabilities(tower, source, vocabulary, i) for i in range(N)])
    for j, (latent, value) in enumerate(zip(moved, target.tolist())):
        after = []
        for i in range(N):
            with steer(tower.model, sae, LAYER, [clamp(latent, value)], tokens="patches", error="keep"):
                after.append(probabilities(tower, source, vocabulary, i))
        change = (torch.stack(after) - before).numpy()
        size = np.abs(change)
        assert found.s[j] == pytest.approx((change**2).sum(1).mean(), rel=1e-3)
        assert found.specificity[j] == pytest.approx(size.sum(0).max() / size.sum(), rel=1e-3)
        assert found.concept[j] == size.sum(0).argmax()
        assert found.concept_change[j] == pytest.approx(change[:, found.concept[j]].mean(), rel=1e-3, abs=1e-9)
        dropped = [
            [moved_probabilities(tower, source, vocabulary, i, sae, edit) for i in range(N)]
            for edit in (clamp(latent, value), scale(latent, 1.0))
        ]
        without_error = torch.stack(dropped[0]) - torch.stack(dropped[1])
        assert found.s_without_error[j] == pytest.approx(float(without_error.pow(2).sum(1).mean()), rel=1e-3)
        most = np.bincount(size.argmax(1)).max() / N
        assert found.consistency[j] == pytest.approx(most)


def test_neurons_as_a_plain_hook_moves_them(tower, vocabulary, source):
    with opened_stream(tower, LAYER, "patches", 3) as stream:
        steering = Steering(stream, list(stream.batches(source, range(N))), Neurons(128), vocabulary)
        found = steering.changes(torch.tensor([7]), torch.tensor([3.0]))
    before = torch.stack([probabilities(tower, source, vocabulary, i) for i in range(N)])

    def hook(module, args, output):
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[:, 1:, 7] = 3.0
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = tower.anatomy.blocks[LAYER].register_forward_hook(hook, prepend=True)
    after = torch.stack([probabilities(tower, source, vocabulary, i) for i in range(N)])
    handle.remove()
    assert found.s[0] == pytest.approx(float((after - before).pow(2).sum(1).mean()), rel=1e-3)


@torch.no_grad()
def test_controls_are_the_same_change_along_other_directions(tower, vocabulary, source):
    """Reversed, random ones of the same length, and unrelated texts; each with a plain hook."""
    sae, latent, target, seed = random_sae(), 17, 2.5, 4
    with opened_stream(tower, LAYER, "patches", 3) as stream:
        batches = list(stream.batches(source, range(N)))
        steering = Steering(stream, batches, Latents(sae), vocabulary, controls=2, seed=seed)
        found = steering.changes(torch.tensor([latent]), torch.tensor([target]))
        x_NTD = torch.cat([batch.x_BTD for batch in batches])
    W_D = sae.W_dec[latent].double()
    change_NT = target - sae.encode(x_NTD.flatten(0, 1)).dense()[:, latent].double().view(x_NTD.shape[:2])
    change_NT[:, 0] = 0  # the class token
    assert found.length[0] == pytest.approx(float(change_NT[:, 1:].square().mean().sqrt() * W_D.norm()), rel=1e-4)
    drawn = [np.random.default_rng((seed, latent, q)).standard_normal(128) for q in range(2)]
    random = [torch.from_numpy(each / np.linalg.norm(each)) * W_D.norm() for each in drawn]
    assert abs(float(torch.nn.functional.cosine_similarity(random[0], random[1], dim=0))) < 0.5

    def steerability(words, direction_D):
        before, after = ([probabilities(tower, source, words, i) for i in range(N)] for _ in range(2))
        for i in range(N):
            moved = (change_NT[i][:, None] * direction_D).float()[None]
            handle = tower.anatomy.blocks[LAYER].register_forward_hook(
                lambda module, args, x, moved=moved: (x[0] + moved, *x[1:]) if isinstance(x, tuple) else x + moved
            )
            after[i] = probabilities(tower, source, words, i)
            handle.remove()
        return float((torch.stack(after) - torch.stack(before)).square().sum(1).mean())

    assert found.s[0] == pytest.approx(steerability(vocabulary, W_D), rel=1e-3)
    assert found.s_reversed[0] == pytest.approx(steerability(vocabulary, -W_D), rel=1e-3)
    for q in range(2):
        assert found.s_random_JQ[0, q] == pytest.approx(steerability(vocabulary, random[q]), rel=1e-3)
    order = torch.randperm(vocabulary.texts_CE.shape[1], generator=torch.Generator().manual_seed(seed))
    unrelated = Vocabulary(vocabulary.words, vocabulary.texts_CE[:, order], vocabulary.logit_scale)
    assert found.s_shuffled[0] == pytest.approx(steerability(unrelated, W_D), rel=1e-3)
    assert len({round(each, 6) for each in (found.s[0], found.s_reversed[0], *found.s_random_JQ[0])}) == 4


def test_units_asked_together_or_alone_are_the_same(stream, vocabulary, source):
    steering = Steering(stream, list(stream.batches(source, range(N))), Neurons(128), vocabulary, controls=2)
    units, target = torch.tensor([1, 2, 9, 40]), torch.tensor([1.0, 2.0, 3.0, 0.5])
    together = steering.changes(units, target)
    for j in range(4):
        alone = steering.changes(units[j : j + 1], target[j : j + 1])
        for name, column in alone.columns().items():
            assert together.columns()[name][j] == pytest.approx(column[0], rel=1e-4, abs=1e-12, nan_ok=True), name


def test_screening_is_the_limit_of_small_changes(stream, vocabulary, source):
    batches, units = list(stream.batches(source, range(N))), Latents(random_sae())
    target = torch.ones(units.n)

    class Moved(Steering):
        """By a hundredth of the way to the target, so that the change is linear."""

        def _change(self, *args):
            return 0.01 * super()._change(*args)

    chosen = torch.arange(0, 40, 5)
    exact = Moved(stream, batches, units, vocabulary).changes(chosen, target[chosen]).s * 1e4
    found = screened(stream, batches, units, target, vocabulary, n_signs=200)[chosen].numpy()
    assert found == pytest.approx(exact, rel=0.4)
    assert np.corrcoef(found, exact)[0, 1] > 0.98


def test_percentiles_are_those_of_values_above_0():
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(57, 6)).astype(np.float32)
    dense[:, 4] = -1
    dense[1:, 5] = 0
    dense[0, 5] = 2.5
    rows, units = np.nonzero(dense > 0)
    found = _quantiles(torch.from_numpy(dense[rows, units]), torch.from_numpy(units), 6).numpy()
    for s in range(6):
        above = dense[:, s][dense[:, s] > 0]
        expected = np.quantile(above.astype(np.float64), 0.99) if len(above) else np.nan
        assert found[s] == pytest.approx(expected, nan_ok=True, rel=1e-6)


def test_reference_of_batches_is_that_of_all_tokens(stream, source):
    units = Latents(random_sae())
    sums = ReferenceSums(units, N)
    x = []
    for batch in stream.batches(source, range(N)):
        mask = stream.mask(batch.x_BTD)[:, :, 0]
        sums.add(batch.x_BTD, mask)
        x.append(batch.x_BTD[mask])
    found = sums.result()
    values = units.read(torch.cat(x)).values(torch.arange(units.n))
    assert torch.allclose(found.density_S, (values > 0).double().mean(0))
    assert not mask[:, 0].any()
    s = int((values > 0).sum(0).argmax())
    assert float(found.q99_S[s]) == pytest.approx(
        float(values[:, s][values[:, s] > 0].detach().quantile(0.99)), rel=1e-5
    )


def test_chances_by_loops():
    generator = np.random.default_rng(1)
    s, length, random = generator.random(30), generator.random(30), generator.random((30, 3))
    found = chances(s, length, random)
    for j in range(30):
        near = sorted(range(30), key=lambda i: (abs(np.log(length[i]) - np.log(length[j])), i))
        pool = [random[i, q] for i in near for q in range(3)][: min(NEAREST, 90)]
        assert found[j] == pytest.approx((1 + sum(each >= s[j] for each in pool)) / (1 + len(pool)))
    assert chances(np.array([2.0]), np.array([1.0]), np.ones((1, 199)))[0] == pytest.approx(1 / 200)


def test_the_nearest_in_density():
    assert nearest_in_density(np.array([0.1, 0.5, 0.11, 0.0])).tolist() == [2, 2, 0, 0]
    assert nearest_in_density(np.array([0.3])).tolist() == [-1]
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(10, 3) == [0, 3, 6]


def test_dead_latents_blocks_and_going_on(stream, vocabulary, source, tmp_path, monkeypatch):
    sae = random_sae()
    with torch.no_grad():
        sae.W_enc[:, 5] = 0
        sae.b_enc[5] = -10
    units, config = Latents(sae), SteerabilityConfig(ask=4, n_reference=5, controls=6)
    monkeypatch.setattr("saevlm_fast.clip_steering.run._BLOCK", 8)
    asking = Asking(stream, source, vocabulary, config, {"made": "of this"})
    [known] = asking.references([units])
    chosen = torch.arange(20)
    parts = Parts(tmp_path)
    first = asking.measure(units, known, chosen, parts)
    calls = []
    monkeypatch.setattr(Steering, "changes", lambda *args: calls.append(args))
    again = asking.measure(units, known, chosen, Parts(tmp_path))
    assert calls == []
    assert str(again.table.to_pydict()) == str(first.table.to_pydict())
    assert first.table["status"].to_pylist()[5] == "dead"
    assert np.isnan(first.table["s"].to_pylist()[5])
    assert first.summary["dead"] == int((known.density_S[:20] == 0).sum())
    assert 0 <= first.summary["steerable"]["value"] <= 1
    other = Asking(stream, source, vocabulary, config, {"made": "of that"})
    with pytest.raises(AttributeError):  # `changes` is gone: what was made of something else is not taken
        other.measure(units, known, chosen, parts)
    assert calls
