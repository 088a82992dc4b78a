"""Matrix files of every kind, and rows that are not finite."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saevlm_fast.data.matrix import check_finite
from saevlm_fast.data.order import ShuffledRows, batches
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.errors import ActivationError
from stores import DTYPES, gathered, rows_of, save_matrix, write_store

# Matrix files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
def test_matrix_files(tmp_path, suffix, dtype):
    if suffix == ".npy" and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    x = rows_of(23, 6, dtype)
    matrix = open_activations(save_matrix(tmp_path / f"x{suffix}", x))
    assert (matrix.n_rows, matrix.d, matrix.dtype, matrix.source, matrix.has_items) == (23, 6, dtype, None, False)
    assert torch.equal(gathered(matrix), x.float())
    picks = torch.tensor([22, 0, 5, 5])
    assert matrix.rows(picks).dtype == torch.float32
    assert torch.equal(matrix.rows(picks), x.float()[picks])
    with pytest.raises(ActivationError, match="no item ids"):
        matrix.items()


def test_strided_matrices(tmp_path):
    x = rows_of(9, 4)
    np.save(tmp_path / "f.npy", np.asfortranarray(x.numpy()))
    torch.save({"x": x.t(), "step": 3, "bias": torch.zeros(2)}, tmp_path / "t.pt")
    torch.save(torch.nn.Parameter(x)[2:7, 1:], tmp_path / "slice.pt")
    for name, expected in [("f.npy", x), ("t.pt", x.t()), ("slice.pt", x[2:7, 1:])]:
        matrix = open_activations(tmp_path / name)
        assert torch.equal(gathered(matrix), expected)
        assert torch.equal(matrix.rows(torch.tensor([2, 0])), expected[[2, 0]])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_one_of_several_matrices_by_name(tmp_path, suffix):
    tensors = {"a": rows_of(3), "b": rows_of(4), "c": torch.zeros(2)}
    path = tmp_path / f"x{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    assert torch.equal(gathered(open_activations(f"{path}::b")), tensors["b"])
    for key, message in [
        ("", r"2 2-D tensors; name one as FILE::NAME; there are: 'a' \[3, 5\]"),
        ("::z", "::z: no such"),
    ]:
        with pytest.raises(ActivationError, match=message):
            open_activations(f"{path}{key}")
    with pytest.raises(ActivationError, match=r"shape is \[2\]; a matrix"):
        open_activations(f"{path}::c")


def test_an_existing_file_comes_before_a_named_tensor(tmp_path):
    np.save(tmp_path / "a::b.npy", rows_of(3).numpy())
    assert torch.equal(gathered(open_activations(tmp_path / "a::b.npy")), rows_of(3))
    write_store(tmp_path / "c::d", rows_of(4))
    assert torch.equal(gathered(open_activations(tmp_path / "c::d")), rows_of(4))
    save_file({"a": rows_of(3), "b": rows_of(4)}, tmp_path / "e::f.safetensors")
    assert torch.equal(gathered(open_activations(tmp_path / "e::f.safetensors::b")), rows_of(4))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["bare pickle", "torch.save", "legacy torch.save", "object array"])
def test_disguised_pickles_are_refused_and_never_run(tmp_path, suffix, kind):
    path, target = tmp_path / f"x{suffix}", tmp_path / "executed"
    with open(path, "wb") as file:
        if kind == "bare pickle":
            pickle.dump(Bomb(target), file)
        elif kind == "object array":
            np.save(file, np.array([[Bomb(target)]], dtype=object), allow_pickle=True)
        else:
            torch.save({"x": rows_of(3), "b": Bomb(target)}, file, _use_new_zipfile_serialization=kind == "torch.save")
    with pytest.raises(ActivationError) as caught:
        open_activations(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def refused(path, message):
    with pytest.raises(ActivationError, match=message) as caught:
        open_activations(path)
    assert str(path).partition("::")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_activations(tmp_path):
    refused(tmp_path / "none.npy", "no such file or directory")
    refused(tmp_path, "no index.json in it: not a store of activations or codes$")
    for name in ("a.npy", "b.pt", "notes.txt"):
        (tmp_path / "two" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "two" / name).touch()
    refused(tmp_path / "two", r"not a store of activations or codes; name what is meant of a.npy, b.pt in it$")
    (tmp_path / "two" / "c.safetensors").touch()
    refused(
        tmp_path / "two", r"a.npy, b.pt, c.safetensors in it; sf.ActivationWriter makes one store of several matrices$"
    )
    torch.save([torch.ones(2, 3)], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "no 2-D tensor in it; a matrix, or a dict of tensors by name, is read$")
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "1.JPEG").touch()
    refused(tmp_path / "photos", "codes; images are in it, of which `harvest` makes a store$")
    (tmp_path / "one" / "residual-22-cls").mkdir(parents=True)
    (tmp_path / "one" / "residual-22-cls" / "index.json").touch()
    refused(tmp_path / "one", r"codes; name what is meant of residual-22-cls in it$")
    (tmp_path / "x.csv").write_text("1,2")
    refused(tmp_path / "x.csv", r"unknown suffix '.csv'; a matrix file is one of .npy, .safetensors, .pt")
    for suffix in (".npy", ".safetensors", ".pt"):
        (tmp_path / f"empty{suffix}").write_bytes(b"")
        refused(tmp_path / f"empty{suffix}", "the file is empty")
    np.savez(tmp_path / "z.npz", x=np.zeros((2, 2)))
    os.rename(tmp_path / "z.npz", tmp_path / "z.npy")
    refused(tmp_path / "z.npy", "not a readable .npy")
    np.save(tmp_path / "ok.npy", np.zeros((2, 2)))
    refused(f"{tmp_path / 'ok.npy'}::key", "no named tensors")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 4), r"\[0, 4\]"),
        (torch.zeros(4, 0), r"\[4, 0\]"),
        (torch.zeros(4), r"\[4\]"),
        (torch.zeros(2, 3, 4), r"\[2, 3, 4\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "int64|I64"),
        (torch.zeros(2, 3, dtype=torch.complex64), "complex64|C64"),
        (torch.zeros(2, 3, dtype=torch.bool), "bool|BOOL"),
    ],
)
def test_matrices_of_the_wrong_shape_or_dtype(tmp_path, suffix, x, message):
    if x.is_complex() and suffix == ".safetensors":
        pytest.skip("old safetensors cannot write it")
    refused(save_matrix(tmp_path / f"x{suffix}", x), message)


def test_other_unusable_matrices(tmp_path):
    np.save(tmp_path / "big.npy", np.zeros((2, 2), dtype=">f4"))
    refused(tmp_path / "big.npy", "little-endian")
    np.save(tmp_path / "bfloat16.npy", np.zeros((2, 2), dtype="V2"))  # as ml_dtypes has it saved
    refused(tmp_path / "bfloat16.npy", r"dtype is \|V2; accepted: float16, bfloat16, .*save that as .safetensors")
    np.save(tmp_path / "long.npy", np.zeros((2, 2), dtype=np.longdouble))
    refused(tmp_path / "long.npy", "dtype is float128|dtype is longdouble")
    torch.save(torch.eye(3).to_sparse(), tmp_path / "sparse.pt")
    refused(tmp_path / "sparse.pt", "accepted: dense|refused")
    torch.save([rows_of(3)], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "no 2-D tensor in it")
    torch.save(rows_of(30), tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as old,
        zipfile.ZipFile(tmp_path / "zip.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    refused(tmp_path / "zip.pt", "compressed")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
@settings(max_examples=40)
@given(data=st.data())
def test_truncated_and_altered_headers_never_escape(tmp_path_factory, suffix, data):
    """Whatever the bytes, opening gives a matrix or an ActivationError."""
    path = save_matrix(tmp_path_factory.mktemp("m") / f"x{suffix}", rows_of(3, 4))
    content = bytearray(path.read_bytes())
    truncated = data.draw(st.booleans())
    if truncated:
        content = content[: data.draw(st.integers(1, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, min(len(content), 600) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    if truncated:
        with pytest.raises(ActivationError):
            open_activations(path)
        return
    try:
        matrix = open_activations(path)
        for _ in matrix.chunks(2):
            pass
    except ActivationError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_reading_a_matrix_larger_than_memory(tmp_path):
    """Half again as large as this machine's memory, as a sparse file: mapping it privately would be refused."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    d = 1024
    n = total * 3 // 2 // (4 * d)
    header = json.dumps({"x": {"dtype": "F32", "shape": [n, d], "data_offsets": [0, n * d * 4]}}).encode()
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + n * d * 4)
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(3).tobytes())
    matrix = open_activations(path)
    assert matrix.rows(torch.tensor([n - 1, 0]))[0, -1] == 3
    assert not ShuffledRows(matrix, 4096)._exact or n * d * 4 <= 8 << 30


# A matrix in memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_matrix_in_memory_reads_like_a_file(tmp_path, kind, dtype):
    if kind == "numpy" and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    x = rows_of(23, 6, dtype)
    matrix = Activations.from_tensor(x.numpy() if kind == "numpy" else x)
    suffix = ".pt" if dtype == torch.bfloat16 else ".npy"
    file = open_activations(save_matrix(tmp_path / f"x{suffix}", x))
    for side in (matrix, file):
        assert (side.n_rows, side.d, side.dtype, side.source, side.has_items) == (23, 6, dtype, None, False)
    assert str(matrix.path) == "tensor [23, 6]"
    picks = torch.tensor([22, 0, 5, 5])
    assert torch.equal(matrix.rows(picks), file.rows(picks))
    assert torch.equal(gathered(matrix), gathered(file))
    for mine, its in zip(
        batches(matrix, ShuffledRows(matrix, 4), 3, 9), batches(file, ShuffledRows(file, 4), 3, 9), strict=True
    ):
        assert torch.equal(mine[0], its[0])
        assert torch.equal(mine[1], its[1])
    with pytest.raises(ActivationError, match=r"tensor \[23, 6\]: a matrix has no item ids"):
        matrix.items()


def test_a_mask_is_not_lost_and_a_tensor_without_numbers_is_named():
    masked = np.ma.masked_array(rows_of(9, 4).numpy(), mask=np.eye(9, 4, dtype=bool))
    with pytest.raises(ActivationError, match="x: a masked array, whose mask would be lost"):
        Activations.from_tensor(masked)
    with pytest.raises(ActivationError, match="x: on the meta device"):
        Activations.from_tensor(torch.empty(9, 4, device="meta"))


def test_a_matrix_in_memory_is_not_copied():
    x = rows_of(9, 4)
    array = x.numpy().copy()
    for each in (x, x.T, x[::2, 1:], array, array.T, array[::2, 1:], np.asfortranarray(array)):
        held = Activations.from_tensor(each)._tensors[0]
        pointer = each.data_ptr() if isinstance(each, torch.Tensor) else each.ctypes.data
        assert held.data_ptr() == pointer
        assert torch.equal(gathered(Activations.from_tensor(each)), torch.as_tensor(each).float())
    assert torch.equal(gathered(Activations.from_tensor(array[::-1])), x.flip(0))  # torch has no negative strides
    trained = torch.nn.Parameter(x)
    assert not Activations.from_tensor(trained).rows(torch.tensor([1])).requires_grad


@pytest.mark.filterwarnings("error")
def test_a_read_only_array_is_read_without_a_warning():
    array = rows_of(5).numpy()
    array.flags.writeable = False
    assert torch.equal(gathered(Activations.from_tensor(array)), rows_of(5))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4), r"x: shape is \[4\]; a matrix \[rows, d_in\] is needed"),
        (np.zeros((2, 3, 4)), r"x: shape is \[2, 3, 4\]; a matrix"),
        (torch.zeros(0, 4), r"x: shape is \[0, 4\]; at least 1 row"),
        (np.zeros((4, 0)), r"x: shape is \[4, 0\]; at least 1 row and 1 column"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            "x: dtype int64; accepted: float16, bfloat16, float32 or float64$",
        ),
        (np.zeros((2, 3), dtype=np.int32), "x: dtype is int32; .*float32 or float64, .*NumPy has no bfloat16"),
        (np.zeros((2, 3), dtype=">f4"), "x: dtype is >f4; .*little-endian"),
        (torch.eye(3).to_sparse(), "x: a tensor of layout sparse_coo, must be dense"),
        (torch.nested.nested_tensor([torch.eye(3), torch.ones(2, 3)]), "x: a tensor of layout nested, must be dense"),
        (torch.ones(2, 3, device="meta"), "x: on the meta device, which holds no numbers"),
        ([[1.0, 2.0]], r"x: list; a torch tensor or a NumPy array"),
    ],
)
def test_what_is_no_matrix_in_memory(x, message):
    with pytest.raises(ActivationError, match=message):
        Activations.from_tensor(x)


def test_a_row_in_memory_that_is_not_finite_is_named_when_it_is_read():
    x = rows_of(30)
    x[21, 3] = torch.nan
    matrix = Activations.from_tensor(x)
    matrix.rows(torch.tensor([20, 22]))
    with pytest.raises(ActivationError, match=r"tensor \[30, 5\]: row 21, column 3 is nan; it must be finite"):
        gathered(matrix)


# Finite ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_named(tmp_path, value):
    x = rows_of(30)
    x[21, 3] = value
    matrix = open_activations(save_matrix(tmp_path / "x.npy", x))
    message = rf"x.npy: row 21, column 3 is {value}"
    with pytest.raises(ActivationError, match=message):
        gathered(matrix)
    with pytest.raises(ActivationError, match=message):
        matrix.rows(torch.tensor([0, 21, 22]))
    with pytest.raises(ActivationError, match=message):
        list(batches(matrix, ShuffledRows(matrix, 4), 0, 7 * 2))
    matrix.rows(torch.tensor([20, 22]))


def test_finite_values_whose_sum_overflows_are_fine():
    check_finite(torch.full((3, 4), 3e38), range(3), "x")
    check_finite(torch.empty(0, 4), range(0), "x")
    check_finite(torch.full((100, 4), 60000.0, dtype=torch.float16), range(100), "x")
    with pytest.raises(ActivationError, match="row 12, column 0 is inf"):
        check_finite(
            torch.tensor([[3e38, 3e38], [3e38, 3e38], [torch.inf, -torch.inf]]), torch.tensor([10, 11, 12]), "x"
        )
