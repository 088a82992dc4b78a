"""Settings are validated where they are made, with messages that name argument, value and limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saevlm_fast.config import SAEConfig, TrainConfig, group_sizes_from_fractions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_in": 0, "d_sae": 8}, "d_in: 0"),
        ({"d_in": 4, "d_sae": 8, "k": 9}, "k: 9 must be between 1 and d_sae = 8"),
        ({"d_in": 4, "d_sae": 8, "k": 0}, "k: 0"),
        ({"d_in": 4, "d_sae": 8, "k": 2, "architecture": "gated"}, "architecture: 'gated' is not one of"),
        ({"d_in": 4, "d_sae": 8, "k": 2, "architecture": "matryoshka"}, "group_sizes: a matryoshka SAE needs"),
        ({"d_in": 4, "d_sae": 8, "k": 2, "architecture": "matryoshka", "group_sizes": (3, 4)}, "sum to 7, not to"),
        ({"d_in": 4, "d_sae": 8, "k": 2, "architecture": "matryoshka", "group_sizes": (8, 0)}, "at least 1"),
        ({"d_in": 4, "d_sae": 8, "k": 2, "architecture": "topk", "group_sizes": (4, 4)}, "only a matryoshka"),
    ],
)
def test_bad_sae_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"warmup_steps": -1},
     {"seed": -1}, {"auxk_alpha": -0.1}, {"dead_after": 0}, {"clip_norm": 0.0}, {"threshold_beta": 1.0}],
)  # fmt: skip
def test_bad_train_settings(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=name):
        TrainConfig(**settings)


def test_paper_learning_rate_and_warmup():
    config = TrainConfig()
    assert config.peak_lr(2**14) == pytest.approx(2e-4)
    assert config.peak_lr(2**16) == pytest.approx(1e-4)
    assert [config.lr_at(step, 2**14) for step in (0, 500, 1000, 109_999)] == pytest.approx([0, 1e-4, 2e-4, 2e-4])
    assert TrainConfig(steps=200).lr_at(20, 2**14) == pytest.approx(2e-4), "short runs warm up for a tenth"
    assert TrainConfig(warmup_steps=0).lr_at(0, 2**14) == pytest.approx(2e-4)


def test_the_penalty_rises_in_a_fifth_of_a_run_and_in_2000_steps_at_most():
    long, short = TrainConfig(steps=50_000), TrainConfig(steps=100)
    assert [long.sparsity_scale(step) for step in (0, 500, 2000, 49_999)] == pytest.approx([0, 0.25, 1, 1])
    assert [short.sparsity_scale(step) for step in (0, 5, 20, 99)] == pytest.approx([0, 0.25, 1, 1])
    assert TrainConfig(sparsity_warmup=0).sparsity_scale(0) == 1
    assert (long.l1_weight, long.wanted_l0, long.ste_bandwidth) == (0.03, 20.0, 0.001)


def test_group_sizes_of_the_paper():
    assert group_sizes_from_fractions((0.0625, 0.125, 0.25, 0.5625), 8192) == (512, 1024, 2048, 4608)


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (0.7, 0.5), (1.5, -0.5), (0.0001, 0.9999)])
def test_bad_fractions(fractions):
    with pytest.raises(ValueError, match="groups"):
        group_sizes_from_fractions(fractions, 100)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(100, 3000))
def test_group_sizes_always_cover_d_sae(parts, d_sae):
    fractions = tuple(p / sum(parts) for p in parts)
    try:
        sizes = group_sizes_from_fractions(fractions, d_sae)
    except ValueError as error:
        assert "empty" in str(error)  # noqa: PT017
        return
    assert sum(sizes) == d_sae
    assert all(abs(size - f * d_sae) <= len(parts) for size, f in zip(sizes, fractions))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAEConfig(8, 2**63 - 1), "d_sae: 9223372036854775807 must be below 2"),
        (lambda: SAEConfig.sized(8, d_sae=2**63), "d_sae: 9223372036854775808 must be below 2"),
        (lambda: SAEConfig.sized(8, d_sae=2**63, architecture="matryoshka"), "d_sae: 9223372036854775808 must be"),
        (lambda: SAEConfig.sized(2**31 - 1, expansion=9e5), "d_sae: "),
        (lambda: SAEConfig.sized(8, expansion=0.01), "expansion: 0.01 times d_in = 8 leaves no latent"),
        (lambda: SAEConfig(8.0, 16), "d_in: 8.0 must be a whole number"),
        (lambda: SAEConfig(8, True), "d_sae: True must be a whole number"),
        (lambda: SAEConfig(8, 16, 2**70), "k: "),
        (lambda: SAEConfig(8, 16, 2, "matryoshka", (8.5, 7.5)), "group_sizes: 8.5 is not a whole number"),
        (lambda: TrainConfig(warmup_steps=2**64), "warmup_steps: 18446744073709551616 must be below"),
        (lambda: TrainConfig(threshold_start=2**64), "threshold_start: "),
    ],
)
def test_sizes_that_no_tensor_has_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
