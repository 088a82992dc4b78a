"""Sparse codes: both layouts of one type against the dense codes, the order by latent, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saevlm_fast.errors import ActivationError
from saevlm_fast.sparse_codes import SparseCodes
from sparse_codes import random_sparse_codes

LAYOUTS = ["fixed", "csr"]


def make(n_rows, k, d_sae, layout, seed=0):
    return random_sparse_codes(n_rows, k, d_sae, layout, torch.float32, seed)


@settings(max_examples=40)
@given(st.integers(0, 9), st.integers(0, 5), st.sampled_from([6, 70_000]), st.sampled_from(LAYOUTS), st.integers(0, 9))
def test_every_form_is_the_same_dense_codes(n_rows, k, d_sae, layout, seed):
    codes = make(n_rows, k, d_sae, layout, seed)
    dense_NS = codes.dense()
    assert (codes.n_rows, codes.d_sae, codes.shape) == (n_rows, d_sae, (n_rows, d_sae))
    assert dense_NS.shape == (n_rows, d_sae)
    assert torch.equal(SparseCodes.from_flat(*codes.flat(), d_sae).dense(), dense_NS)
    assert codes.rows().row_offsets is not None
    for other in (codes.rows(), codes.compact(), codes.to("cpu", torch.float64).to(dtype=torch.float32)):
        assert torch.equal(other.dense(), dense_NS)
        assert torch.equal(other.l0(), (dense_NS > 0).sum(1))
    assert codes.n_entries == codes.compact().n_entries == int((dense_NS > 0).sum())
    rows_M, (acts_M, latents_M, _) = codes.entry_rows(), codes.csr()
    inside_M = rows_M < n_rows
    assert torch.equal(acts_M[inside_M], dense_NS[rows_M[inside_M], latents_M[inside_M]])
    assert int((~inside_M).sum()) == len(acts_M) - codes.n_entries
    codes.check("codes")
    codes.compact().check("codes", as_stored=True)


@settings(max_examples=40)
@given(st.integers(0, 9), st.integers(0, 5), st.sampled_from([6, 70_000]), st.sampled_from(LAYOUTS), st.integers(0, 9))
def test_by_latent_is_the_transposed_dense_codes(n_rows, k, d_sae, layout, seed):
    codes = make(n_rows, k, d_sae, layout, seed)
    grouped = codes.by_latent()
    n_entries = codes.n_entries
    assert (len(grouped.offsets_S1), int(grouped.offsets_S1[-1])) == (d_sae + 1, n_entries)
    latents_M, rows_M = codes.dense().T.nonzero().unbind(1)
    assert torch.equal(grouped.latents_M[:n_entries], latents_M)
    assert torch.equal(codes.entry_rows()[grouped.order_M][:n_entries], rows_M)
    assert torch.equal(grouped.acts_M[:n_entries], codes.dense()[rows_M, latents_M])
    assert torch.equal(grouped.offsets_S1.diff(), (codes.dense() > 0).sum(0))


def test_nothing_is_copied_between_the_layouts():
    fixed, ragged = make(4, 3, 20, "fixed"), make(4, 3, 20, "csr")
    assert fixed.rows().top_acts.data_ptr() == fixed.flat()[0].data_ptr() == fixed.top_acts.data_ptr()
    assert ragged.rows().top_indices is ragged.top_indices
    assert ragged.to("cpu", torch.float32).top_acts is ragged.top_acts


def test_leading_dimensions_are_flattened_for_the_kernels():
    acts, latents, _, _ = make(6, 3, 20, "fixed")
    codes = SparseCodes(acts.view(2, 3, 3), latents.view(2, 3, 3), None, (2, 3, 20))
    codes.check("codes")
    assert codes.n_rows == 6
    assert codes.rows().shape == (6, 20)
    assert torch.equal(codes.rows().dense().view(2, 3, 20), codes.dense())
    ragged = codes.rows()._replace(shape=(2, 3, 20))
    ragged.check("codes")
    assert torch.equal(ragged.dense(), codes.dense())
    assert ragged.l0().shape == (2, 3)


@pytest.mark.parametrize("layouts", [["fixed"] * 3, ["csr"] * 3, ["csr", "fixed", "csr"], ["fixed"], ["csr"]])
def test_join(layouts):
    pieces = [make(n, 3, 50, layout, n) for n, layout in zip((4, 0, 2), layouts)]
    joined = SparseCodes.join(pieces, 50)
    assert torch.equal(joined.dense(), torch.cat([piece.dense() for piece in pieces]))
    joined.check("joined", as_stored=True)  # no padding left within
    assert SparseCodes.join([], 50).dense().shape == (0, 50)
    with pytest.raises(ValueError, match="codes: of 50 latents; the others are of 49"):
        SparseCodes.join(pieces, 49)


def test_compact_keeps_nan_and_drops_zeros_and_padding():
    acts, latents = torch.tensor([[1.0, 0.0], [torch.nan, 2.0]]), torch.tensor([[1, 2], [0, 3]])
    acts_M, latents_M, row_offsets, _ = SparseCodes(acts, latents, None, (2, 5)).compact()
    assert acts_M.nan_to_num(9.0).tolist() == [1.0, 9.0, 2.0]
    assert (latents_M.tolist(), row_offsets.tolist()) == ([1, 0, 3], [0, 1, 3])


def ragged(acts, latents, *row_offsets, d_sae=5):
    return SparseCodes.from_flat(torch.tensor(acts), torch.tensor(latents), torch.tensor(row_offsets), d_sae)


@pytest.mark.parametrize(
    ("codes", "message", "stored_only"),
    [
        (ragged([1.0, -2.0], [0, 1], 0, 1, 2), "it: row 11, latent 1: -2 is not a finite activation", False),
        (ragged([1.0, torch.inf], [0, 1], 0, 2), "it: row 10, latent 1: inf is not a finite activation", False),
        (ragged([torch.nan], [3], 0, 0, 0, 1), "it: row 12, latent 3: nan is not a finite activation", False),
        (ragged([1.0], [5], 0, 1), "it: row 10, latent 5: 5 is not a latent within 0 to 4", False),
        (ragged([1.0], [-1], 0, 1), "it: row 10, latent -1: -1 is not a latent within 0 to 4", False),
        (ragged([0.0], [1], 0, 1), "it: row 10, latent 1: 0 is not a finite activation above 0", True),
        (ragged([1.0, 1.0], [2, 2], 0, 2), "it: row 10, latent 2: 2 comes after a latent that is not below", True),
        (ragged([1.0, 1.0], [2, 1], 0, 2), "it: row 10, latent 1: 1 comes after a latent that is not below", True),
        (ragged([1.0, 1.0], [1, 2], 0, 1), "it: row_offsets end at 1, but there are 2 entries", True),
        (ragged([1.0], [1], 0, 2), "it: row_offsets end at 2, but there are 1 entries", False),
        (ragged([1.0, 1.0], [1, 2], 0, 2, 1, 2), "it: row 11 ends at entry 1, before it begins at 2", False),
        (ragged([1.0], [1], 1, 1), "it: row_offsets start at 1, not at 0", False),
        (ragged([1], [1], 0, 1), r"it: top_acts int64 \[1\], .* are not codes \[1, 5\] in CSR form", False),
        (ragged([1.0], [1], 0, 1)._replace(shape=(2, 5)), r"row_offsets int64 \[2\] are not codes \[2, 5\] in", False),
        (SparseCodes(torch.ones(2, 1), torch.ones(2, 1).long(), None, (3, 5)), r"codes \[3, 5\] of fixed k", False),
        (SparseCodes(torch.ones(1, 2), torch.tensor([[0, 7]]), None, (1, 5)), "row 10, latent 7: 7 is not a", False),
    ],
)
def test_check_names_the_row_the_latent_the_value_and_the_rule(codes, message, stored_only):
    with pytest.raises(ActivationError, match=message) as caught:
        codes.check("it", 10, as_stored=True)
    assert "\n" not in str(caught.value)
    if stored_only:
        codes.check("it", 10)
    else:
        with pytest.raises(ActivationError, match=message):
            codes.check("it", 10)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_gives_the_same(layout):
    codes = make(300, 7, 900, layout)
    on_gpu = codes.to("cuda")
    on_gpu.check("codes")
    assert torch.equal(on_gpu.dense().cpu(), codes.dense())
    for found, expected in ((on_gpu.compact(), codes.compact()), (SparseCodes.join([on_gpu] * 2, 900), None)):
        expected = SparseCodes.join([codes] * 2, 900) if expected is None else expected
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found[:3], expected[:3]))
    n_entries = codes.n_entries
    for a, b in zip(on_gpu.by_latent()[:3], codes.by_latent()[:3]):
        assert torch.equal(a.cpu()[:n_entries], b[:n_entries])
    assert torch.equal(on_gpu.by_latent().offsets_S1.cpu(), codes.by_latent().offsets_S1)
