"""Which tokens become rows: against plain indexing, and what random tokens may depend on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saevlm_fast.towers.tokens import POOLED, TokenLayout, Tokens, select_tokens

CHOICES = ("cls", "patches", "all", "mean", "random:1", "random:3", "random:3:all")


def acts_of(n_images, n_tokens):
    """Every value tells image and position: 1000 * image + token, in each of 2 columns."""
    numbers = 1000 * torch.arange(n_images)[:, None] + torch.arange(n_tokens)
    return numbers[:, :, None].expand(-1, -1, 2).float()


@st.composite
def cases(draw):
    n_prefix = draw(st.integers(0, 5))
    layout = TokenLayout(n_prefix + draw(st.integers(3, 12)), n_prefix, n_prefix > 0 and draw(st.booleans()))
    ids = draw(st.lists(st.text(max_size=5), min_size=1, max_size=6, unique=True))
    mask = None
    if draw(st.booleans()):  # padding at the end, as NaFlex has it, or anywhere; at least 3 patches stay
        mask = torch.ones(len(ids), layout.n_tokens, dtype=torch.bool)
        for row in mask:
            free = draw(st.lists(st.integers(n_prefix, layout.n_tokens - 1), max_size=layout.n_tokens - n_prefix - 3))
            row[free] = False
    return layout, ids, mask, draw(st.integers(0, 2**40))


@settings(max_examples=60)
@given(case=cases(), text=st.sampled_from(CHOICES))
def test_against_plain_indexing(case, text):
    layout, ids, mask, seed = case
    tokens = Tokens.parse(text)
    if text == "cls" and not layout.has_cls:
        with pytest.raises(ValueError, match="no CLS token"):
            layout.rows_per_image(tokens)
        return
    acts = acts_of(len(ids), layout.n_tokens)
    chosen = select_tokens(acts, tokens, layout, ids, seed, mask)
    keep = torch.ones(len(ids), layout.n_tokens, dtype=torch.bool) if mask is None else mask
    for i in range(len(ids)):
        rows, positions = chosen.rows_MD[chosen.image_of_row == i], chosen.positions[chosen.image_of_row == i]
        patches = [n for n in range(layout.n_prefix, layout.n_tokens) if keep[i, n]]
        allowed = [n for n in range(layout.n_tokens) if keep[i, n]] if text in ("all", "random:3:all") else patches
        if text == "mean":
            assert positions.tolist() == [POOLED]
            torch.testing.assert_close(rows[0], acts[i, patches].mean(0))
            continue
        if tokens.kind == "random":
            assert positions.tolist() == sorted(set(positions.tolist()) & set(allowed))
            assert len(positions) == tokens.k
        else:
            assert positions.tolist() == ([0] if text == "cls" else allowed)
        assert torch.equal(rows, acts[i, positions])
    assert chosen.image_of_row.tolist() == sorted(chosen.image_of_row.tolist())
    if mask is None:
        assert len(chosen.rows_MD) == len(ids) * layout.rows_per_image(tokens)


@settings(max_examples=30)
@given(ids=st.lists(st.text(max_size=5), min_size=1, max_size=8), seed=st.integers(0, 2**40), cut=st.integers(0, 8))
def test_random_tokens_do_not_depend_on_the_batch(ids, seed, cut):
    layout, tokens = TokenLayout(17, 1, True), Tokens.parse("random:4")
    together = select_tokens(acts_of(len(ids), 17), tokens, layout, ids, seed).positions
    parts = [part for part in (ids[:cut], ids[cut:]) if part]
    apart = [select_tokens(acts_of(len(part), 17), tokens, layout, part, seed).positions for part in parts]
    assert torch.equal(torch.cat(apart), together)


def test_random_tokens_are_the_same_for_ever():
    """Fixed numbers: a stored harvest must be continued with the tokens it began with."""
    layout = TokenLayout(577, 1, True)
    chosen = select_tokens(acts_of(2, 577), Tokens.parse("random:3"), layout, ["a.jpg", "b/\udcff.jpg"], seed=7)
    assert chosen.positions.tolist() == [42, 345, 460, 139, 540, 545]


def test_random_tokens_are_uniform_and_differ_between_images_and_seeds():
    layout, ids = TokenLayout(9, 1, True), [f"image {i}" for i in range(4000)]
    acts = torch.zeros(len(ids), 9, 1)
    first = select_tokens(acts, Tokens.parse("random:2"), layout, ids, seed=0).positions.view(-1, 2)
    second = select_tokens(acts, Tokens.parse("random:2"), layout, ids, seed=1).positions.view(-1, 2)
    counts = np.bincount(first.flatten().numpy(), minlength=9)
    assert counts[0] == 0
    assert abs(counts[1:] - 1000).max() < 150  # standard deviation 27
    assert 0.01 < (first == second).all(1).float().mean() < 0.07  # 1 / 28 by chance


def test_all_of_them_drawn_without_replacement():
    layout = TokenLayout(17, 1, True)
    chosen = select_tokens(acts_of(1, 17), Tokens.parse("random:17:all"), layout, ["x"])
    assert chosen.positions.tolist() == list(range(17))
    with pytest.raises(ValueError, match="17 random ones without replacement, but there are 16 to draw from"):
        layout.rows_per_image(Tokens.parse("random:17"))


def test_points_of_the_whole_image_are_one_row_each():
    acts = torch.randn(3, 5)
    chosen = select_tokens(acts, None, TokenLayout(17, 1, True), ["a", "b", "c"])
    assert torch.equal(chosen.rows_MD, acts)
    assert chosen.positions.tolist() == [POOLED] * 3
    assert chosen.image_of_row.tolist() == [0, 1, 2]


def test_the_mean_of_half_precision_is_taken_in_float32():
    acts = torch.full((1, 1025, 1), 0.1, dtype=torch.bfloat16)
    chosen = select_tokens(acts, Tokens("mean"), TokenLayout(1025, 1, True), ["a"])
    assert chosen.rows_MD.dtype == torch.float32
    torch.testing.assert_close(chosen.rows_MD[0, 0], acts[0, 0, 0].float())


@pytest.mark.parametrize(
    "text", ["", "cls ", "random", "random:", "random:0", "random:-1", "random:2:cls", "random:2.5"]
)
def test_choices_that_cannot_be(text):
    with pytest.raises(ValueError, match="tokens: "):
        Tokens.parse(text)


def test_names():
    assert [Tokens.parse(text).name for text in CHOICES[3:]] == ["mean", "random1", "random3", "random3-all"]
