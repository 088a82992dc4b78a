"""Sparse codes: the store, what it refuses, averages over images."""

import json
import os
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from damage import redigest
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import CodesWriter, mean_pool_codes, open_codes
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import read_index, verify
from saevlm_fast.data.writing import ActivationWriter, merge_parts
from saevlm_fast.errors import ActivationError
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.sparse_codes import SparseCodes
from sparse_codes import random_sparse_codes

SOURCE = {"model": "hf:openai/clip", "layer": 11, "tokens": "cls", "sae": {"path": "sae", "pool": "none"}}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def items_of(start, stop):
    return {"image": [f"{i}.jpg" for i in range(start, stop)], "token": [0] * (stop - start)}


def write_codes(path, shards, d_sae=50, dtype=torch.float32, complete=True):
    """A store with one shard for each codes; returns its path."""
    writer, row = CodesWriter(path, d_sae, dtype, SOURCE), 0
    for number, codes in enumerate(shards):
        writer.write_shard(number, codes, items_of(row, row + codes.n_rows))
        row += codes.n_rows
    if complete:
        writer.close()
    return path


def read_dense(store, n):
    """All rows as a dense matrix, chunk by chunk, each chunk's form checked."""
    blocks, next_row = [], 0
    for start, codes in store.chunks(n):
        assert start == next_row
        assert codes.shape == (min(n, store.n_rows - start), store.d_sae)
        assert codes.top_acts.dtype == torch.float32
        codes.check("chunk", as_stored=True)
        assert codes.row_offsets is not None
        blocks.append(codes.dense())
        next_row += codes.n_rows
    return torch.cat(blocks)


def ragged(rows, dtype=torch.float32, d_sae=50):
    """CSR codes of a list of rows, each a dict latent -> act."""
    counts = torch.tensor([0, *(len(row) for row in rows)])
    acts = torch.tensor([act for row in rows for act in row.values()], dtype=dtype)
    latents = torch.tensor([s for row in rows for s in row], dtype=torch.int64)
    return SparseCodes.from_flat(acts, latents, counts.cumsum(0), d_sae)


def csr(acts, latents, *offsets):
    return SparseCodes.from_flat(acts, torch.tensor(latents), torch.tensor(offsets), 50)


# Store -------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(sum),
    k=st.integers(0, 6),
    layout=st.sampled_from(["fixed", "csr"]),
    dtype=st.sampled_from(DTYPES),
    d_sae=st.sampled_from([7, 65536, 65537, 100_000]),
    n=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_a_store_returns_what_was_written(tmp_path_factory, sizes, k, layout, dtype, d_sae, n, seed):
    shards = [random_sparse_codes(size, k, d_sae, layout, dtype, seed + i) for i, size in enumerate(sizes)]
    path = write_codes(tmp_path_factory.mktemp("c") / "store", shards, d_sae, dtype)
    store = open_codes(path)
    expected = torch.cat([codes.dense() for codes in shards]).float()
    assert torch.equal(read_dense(store, n), expected)
    assert (store.n_rows, store.d_sae, store.dtype, store.source) == (sum(sizes), d_sae, dtype, SOURCE)
    assert store.n_entries == int((expected > 0).sum())
    assert store.items()["image"].to_pylist() == items_of(0, sum(sizes))["image"]
    assert [len(table) for table in store.item_chunks(n)] == [len(part) for part in torch.arange(sum(sizes)).split(n)]
    assert verify(path).complete


@pytest.mark.parametrize(("d_sae", "latents_dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_the_files_are_as_documented(tmp_path, d_sae, latents_dtype):
    top = d_sae - 1
    write_codes(tmp_path / "s", [ragged([{3: 1.0, top: 2.0}, {}, {0: 0.5}], d_sae=d_sae)], d_sae, torch.float16)
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert {name: index[name] for name in ("format", "version", "complete", "shape", "dtype", "source")} == {
        "format": "saevlm-fast codes",
        "version": 1,
        "complete": True,
        "shape": [3, d_sae],
        "dtype": "float16",
        "source": SOURCE,
    }
    tensors = load_file(tmp_path / "s" / "shard-00000.safetensors")
    assert {name: t.dtype for name, t in tensors.items()} == {
        "acts": torch.float16,
        "latents": latents_dtype,
        "row_offsets": torch.int32,
    }
    assert tensors["latents"].long().tolist() == [3, top, 0]
    assert tensors["row_offsets"].tolist() == [0, 2, 2, 3]


def test_codes_of_an_sae_are_written_as_they_come(tmp_path):
    """TopK codes with zeros, BatchTopK codes with padding and threshold codes, with any leading dimensions."""
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    for architecture, k in (("topk", 20), ("batch_topk", 4)):
        sae = SparseAutoencoder(SAEConfig(8, 24, k, architecture))
        with torch.no_grad():
            sae.b_enc -= 0.2
        codes = sae.encode(x, use_threshold=False)
        with CodesWriter(tmp_path / architecture, 24, torch.float32, SOURCE) as writer:
            writer.write_shard(0, codes, items_of(0, 12))
        store = open_codes(tmp_path / architecture)
        assert torch.equal(read_dense(store, 5), codes.dense().view(12, 24).detach())
        assert store.n_entries == int((codes.dense() > 0).sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_latent_that_fires_is_never_rounded_to_dead(tmp_path, dtype):
    codes = ragged([{1: 1e-300, 2: 1.0, 3: 0.0}], torch.float64)
    store = open_codes(write_codes(tmp_path / "s", [codes], dtype=dtype))
    _, (acts_M, latents_M, _, _) = next(store.chunks(1))
    assert latents_M.tolist() == [1, 2]
    assert 0 < float(acts_M[0]) < 1e-7
    assert float(acts_M[1]) == 1.0


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (ragged([{1: 1.0}, {2: 1.0, 7: 70000.0}]), "as float16: row 1, latent 7 is 70000; .* 65504; use bfloat16 or f"),
        (ragged([{}, {1: torch.nan}]), "row 1, latent 1: nan is not a finite"),
        (ragged([{1: torch.inf}]), "row 0, latent 1: inf is not a finite"),
        (ragged([{1: 1.0}, {}, {4: -2.0}]), "row 2, latent 4: -2 is not a finite activation above 0"),
        (ragged([{1: 1.0}, {50: 1.0}]), "row 1, latent 50: 50 is not a latent within 0 to 49"),
        (ragged([{-1: 1.0}]), "row 0, latent -1"),
        (ragged([{}, {5: 1.0, 4: 1.0}]), "row 1, latent 4: 4 comes after a latent that is not below it"),
        (csr(torch.ones(2), [3, 3], 0, 2), "row 0, latent 3: 3 comes after"),
        (csr(torch.ones(2), [1, 2], 0, 2, 1), "row 1 ends at entry 1, before it"),
        (csr(torch.ones(2), [1, 2], 0, 3), "end at 3, but there are 2 entries"),
        (csr(torch.ones(2), [1, 2], 1, 2), "row_offsets start at 1"),
        (
            csr(torch.ones(2), [1, 2])._replace(row_offsets=torch.empty(0).long()),
            r"row_offsets int64 \[0\] are not codes",
        ),
        (
            SparseCodes(torch.ones(2, 3), torch.ones(2, 2).long(), None, (2, 50)),
            r"top_acts float32 \[2, 3\], top_indices int64 \[2, 2\] are not codes \[2, 50\] of fixed k",
        ),
        (SparseCodes(torch.ones(2, 3).long(), torch.ones(2, 3).long(), None, (2, 50)), "top_acts int64"),
        (SparseCodes(torch.ones(2, 3), torch.ones(2, 3).int(), None, (2, 50)), "top_indices int32"),
        (ragged([{1: 1.0}], d_sae=51), "rows: codes of 51 latents; the store's are of 50"),
        ((torch.ones(2, 3), torch.ones(2, 3).long(), None), "rows: tuple; a store of codes takes SparseCodes"),
    ],
)
def test_the_writer_refuses_what_is_no_code(tmp_path, codes, message):
    writer = CodesWriter(tmp_path / "s", 50, torch.float16, SOURCE)
    n_rows = codes.n_rows if isinstance(codes, SparseCodes) else 2
    with pytest.raises(ValueError, match=message) as caught:
        writer.write_shard(0, codes, items_of(0, n_rows))
    assert "\n" not in str(caught.value)
    assert read_index(tmp_path / "s").n_rows == 0


def test_ranks_write_numbered_shards_and_rank_0_merges(tmp_path):
    """As the store of activations does: any order, an empty unit, resumed on another number of ranks."""
    shards = [random_sparse_codes(n, 3, 50, "csr", torch.float32, n) for n in (4, 0, 6)]
    CodesWriter(tmp_path / "s", 50, torch.float32, SOURCE)
    ranks = [CodesWriter.resume(tmp_path / "s", part=rank) for rank in range(2)]
    ranks[0].write_shard(2, shards[2], items_of(4, 10))
    ranks[1].write_shard(1, shards[1], items_of(0, 0))
    with pytest.raises(ActivationError, match="shard 0 is not written yet"):
        merge_parts(tmp_path / "s", complete=True)
    assert merge_parts(tmp_path / "s").n_rows == 6
    with pytest.raises(ActivationError, match="incomplete store"):
        open_codes(tmp_path / "s")
    alone = CodesWriter.resume(tmp_path / "s")
    assert alone.done == {1, 2}
    with pytest.raises(ValueError, match="number is 2"):
        alone.write_shard(2, shards[2], items_of(4, 10))
    alone.write_shard(0, shards[0], items_of(0, 4))
    alone.close()
    expected = torch.cat([codes.dense() for codes in shards])
    assert torch.equal(read_dense(open_codes(tmp_path / "s"), 3), expected)


def test_stores_of_the_other_kind_are_refused(tmp_path):
    write_codes(tmp_path / "codes", [ragged([{1: 1.0}])])
    with pytest.raises(ActivationError, match="a store of codes; needed is one of activations"):
        open_activations(tmp_path / "codes")
    with pytest.raises(ActivationError, match="a store of codes; needed is one of activations"):
        ActivationWriter.resume(tmp_path / "codes")
    ActivationWriter(tmp_path / "acts", 4, torch.float32, {})
    with pytest.raises(ActivationError, match="a store of activations; needed is one of codes"):
        open_codes(tmp_path / "acts")
    for width in (0, 1 << 31):
        with pytest.raises(ValueError, match=f"d_sae(:| is) {width}"):
            CodesWriter(tmp_path / "bad", width, torch.float32, {})


def test_imagenet_fits_150_mb(tmp_path):
    """100,000 rows with 20 latents of 65,536 and ids like ImageNet's, scaled to 1.28 M rows."""
    n, generator = 100_000, torch.Generator().manual_seed(0)
    latents = (torch.arange(20) * 3276 + torch.randint(3276, (n, 20), generator=generator)).long()
    names = [f"n{i // 1300:08d}/n{i // 1300:08d}_{int(j)}.JPEG" for i, j in enumerate(torch.randperm(n).tolist())]
    with CodesWriter(tmp_path / "s", 65536, torch.float16, SOURCE) as writer:
        for number, start in enumerate(range(0, n, 20_000)):
            rows = slice(start, start + 20_000)
            items = {"image": names[rows], "token": [0] * 20_000, "label": [name[:9] for name in names[rows]]}
            codes = SparseCodes.from_flat(torch.rand(20_000, 20) + 0.1, latents[rows], None, 65536)
            writer.write_shard(number, codes, items)
    files = {name: os.path.getsize(tmp_path / "s" / name) for name in os.listdir(tmp_path / "s")}
    shards = sum(size for name, size in files.items() if name.startswith("shard"))
    assert n * (20 * 4 + 4) <= shards < n * (20 * 4 + 4) + 5000
    assert sum(files.values()) * 12.82 < 150e6, files


# Damage ------------------------------------------------------------------------------------------


def damaged(path, **changes):
    """Writes the store's only shard anew with some tensors replaced, and its digest with it."""
    file = path / "shard-00000.safetensors"
    save_file({**load_file(file), **changes}, file)
    return redigest(path)


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def u16(*numbers):
    return torch.tensor(numbers, dtype=torch.int32).to(torch.uint16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_offsets": i32(0, 2, 1, 4)}, "row 1 ends at entry 1, before it begins at 2"),
        ({"row_offsets": i32(1, 2, 3, 4)}, "go from 1 to"),
        ({"row_offsets": i32(0, 2, 3, 3)}, "does not fit the file's 4 entries"),
        ({"row_offsets": i32(0, 2, 3, 9)}, "does not fit the file's 4 entries"),
        ({"row_offsets": i32(0, -2, 3, 4)}, "row"),
        ({"row_offsets": i32(0, 2, 1 << 30, 4)}, "row"),
        ({"latents": u16(1, 2, 50, 4)}, "row 1, latent 50: 50 is not a latent within 0 to 49"),
        ({"latents": u16(2, 1, 3, 4)}, "row 0, latent 1: 1 comes after"),
        ({"latents": u16(1, 1, 3, 4)}, "row 0, latent 1: 1 comes after"),
        ({"acts": torch.tensor([1.0, 2.0, torch.nan, 1.0])}, "row 1, latent 3: nan is not a finite activation"),
        ({"acts": torch.tensor([1.0, 2.0, 1.0, 0.0])}, "row 2, latent 4: 0 is not a finite activation above 0"),
        ({"acts": torch.tensor([-1.0, 2.0, 1.0, 1.0])}, "row 0, latent 1: -1 is not"),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 10])
def test_damaged_contents_are_named_by_file_and_row(tmp_path, changes, message, n):
    path = write_codes(tmp_path / "s", [ragged([{1: 1.0, 2: 2.0}, {3: 1.0}, {4: 1.0}])])
    damaged(path, **changes)
    store = open_codes(path)  # headers are fine
    with pytest.raises(ActivationError, match=message if n == 10 else "row") as caught:
        read_dense(store, n)
    assert "shard-00000.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_altered_shard_is_named_before_its_first_row_is_read_and_by_verify(tmp_path):
    path = write_codes(tmp_path / "s", [ragged([{1: 1.0}, {3: 1.0}]), ragged([{1: 2.0}])])
    file = path / "shard-00001.safetensors"
    save_file({**load_file(file), "acts": torch.tensor([3.0])}, file)
    store = open_codes(path)
    with closing(store.chunks(1)) as chunks:
        next(chunks)  # the first shard is sound
    for read in (lambda: read_dense(store, 1), store.check_whole, lambda: verify(path)):
        with pytest.raises(ActivationError, match=r"shard-00001\.safetensors: altered, its SHA-256"):
            read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"acts": torch.ones(3)}, r"holds .*; the store's index says acts float32 \[3\], latents uint16 \[3\]"),
        ({"acts": torch.ones(4, dtype=torch.float16)}, "acts F16"),
        ({"latents": i32(1, 2, 3, 4)}, "latents I32"),
        ({"row_offsets": i32(0, 2, 4)}, r"row_offsets I32 \[3\].*row_offsets int32 or int64 \[4\]"),
        ({"row_offsets": torch.ones(4)}, "row_offsets F32"),
        ({"more": torch.ones(4)}, "more F32"),
    ],
)
def test_headers_are_checked_on_opening(tmp_path, changes, message):
    path = write_codes(tmp_path / "s", [ragged([{1: 1.0, 2: 2.0}, {3: 1.0}, {4: 1.0}])])
    with pytest.raises(ActivationError, match=message):
        open_codes(damaged(path, **changes))


def test_int64_offsets_are_read(tmp_path):
    path = write_codes(tmp_path / "s", [ragged([{1: 1.0, 2: 2.0}, {3: 1.0}])])
    before = read_dense(open_codes(path), 9)
    assert torch.equal(read_dense(open_codes(damaged(path, row_offsets=torch.tensor([0, 2, 3]))), 9), before)


def test_an_item_table_of_another_length_is_refused(tmp_path):
    path = write_codes(tmp_path / "s", [ragged([{1: 1.0}] * 3), ragged([{1: 1.0}] * 4)])
    (path / "items-00000.parquet").write_bytes((path / "items-00001.parquet").read_bytes())
    redigest(path)
    with pytest.raises(ActivationError, match=r"items-00000.parquet: 4 rows; the store's index says 3"):
        open_codes(path).items()


@settings(max_examples=60)
@given(data=st.data())
def test_altered_bytes_never_escape(tmp_path_factory, data):
    """Whatever the bytes of a shard, reading gives sound codes or an ActivationError."""
    path = write_codes(tmp_path_factory.mktemp("c") / "s", [random_sparse_codes(6, 3, 50, "csr", torch.float16)], 50)
    file = path / "shard-00000.safetensors"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content), len(content) - 3]))])
    try:
        found = read_dense(open_codes(path), 4)
    except ActivationError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert bool(((found >= 0) & found.isfinite()).all())


def test_the_map_holds_no_file_open_and_safetensors_reads_it(tmp_path):
    path = write_codes(tmp_path / "s", [random_sparse_codes(5, 3, 50, "csr", torch.float32)])
    store = open_codes(path)
    open_files = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if fd.isdigit() and os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert not [name for name in open_files if str(tmp_path) in name]
    with safe_open(path / "shard-00000.safetensors", framework="np") as file:
        assert file.get_tensor("latents").dtype == np.uint16
    assert store.n_rows == 5


# Averages -------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    images=st.lists(st.integers(0, 6), max_size=25),
    k=st.integers(0, 8),
    layout=st.sampled_from(["fixed", "csr"]),
    seed=st.integers(0, 9),
)
def test_mean_over_images_against_the_dense_mean(images, k, layout, seed):
    """Images with any number of tokens, none included, in any order."""
    codes = random_sparse_codes(len(images), k, 20, layout, torch.float32, seed)
    pooled = mean_pool_codes(codes, torch.tensor(images, dtype=torch.int64), 8)
    dense_NS = codes.dense().double()
    of_image = [dense_NS[[row for row, image in enumerate(images) if image == i]] for i in range(8)]
    expected = torch.stack([rows.mean(0) if len(rows) else torch.zeros(20, dtype=torch.float64) for rows in of_image])
    found = pooled.dense()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())  # sums in float64, rounded once
    assert bool((pooled.top_acts > 0).all())
    for row in range(8):
        latents = pooled.top_indices[pooled.row_offsets[row] : pooled.row_offsets[row + 1]]
        assert bool((latents.diff() > 0).all())


def test_pooled_codes_go_into_a_store(tmp_path):
    codes = random_sparse_codes(12, 4, 50, "csr", torch.float32)
    pooled = mean_pool_codes(codes, torch.arange(12) // 3, 5)
    store = open_codes(write_codes(tmp_path / "s", [pooled]))
    assert torch.equal(read_dense(store, 2)[:4], codes.dense().double().view(4, 3, 50).mean(1).float())
    assert not read_dense(store, 9)[4].any()


def test_a_faint_latent_survives_the_mean():
    codes = csr(torch.tensor([1e-45]), [2], 0, 1, 1, 1)
    pooled = mean_pool_codes(codes, torch.zeros(3, dtype=torch.int64), 1)
    assert pooled.top_indices.tolist() == [2]
    assert float(pooled.top_acts) > 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.tensor([0, 1]), r"int64 \[2\]; int64 \[3\]"),
        (torch.tensor([0.0, 1, 2]), "float32"),
        (torch.tensor([0, 1, 5]), "0 to 5 is not within 0 to 3"),
        (torch.tensor([0, -1, 2]), "-1 to 2 is not within"),
    ],
)
def test_mean_refuses_images_that_do_not_fit(images, message):
    with pytest.raises(ValueError, match=message):
        mean_pool_codes(ragged([{1: 1.0}] * 3), images, 4)


@pytest.mark.gpu
def test_mean_on_a_gpu_equals_the_cpu():
    codes = random_sparse_codes(400, 9, 300, "csr", torch.float32)
    images = torch.randint(50, (400,), generator=torch.Generator().manual_seed(0))
    on_gpu = mean_pool_codes(codes.to("cuda"), images.cuda(), 50)
    for found, expected in zip(on_gpu[:3], mean_pool_codes(codes, images, 50)[:3]):
        assert torch.equal(found.cpu(), expected)
