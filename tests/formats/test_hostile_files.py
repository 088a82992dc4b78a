"""Files that are damaged, or made to harm: one line of ValueError each, whatever is wrong and wherever."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import Tensor

from foreign_files import S, rows, save
from foreign_language import ALL
from foreign_trainers import TRAINERS
from plain_forward import forward
from saevlm_fast.formats.registry import FORMATS, read

# One configuration of each format, and those with more files or tensors than it.
NAMES = sorted({made.format: name for name, make in ALL.items() for made in [make(torch.float32)]}.values())
NAMES += ["prisma_gated-None", "overcomplete-batch norm-topk", "archetypal-topk", "msae-JumpReLU-False-False"]
NAMES = list(dict.fromkeys([*NAMES, "visaebench-simple-jumprelu", "lm_saes_bare-True", "llama_scope_r1-True"]))
DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000


def tensors_in(value):
    """The dict of tensors in what a file holds, for changing."""
    inner = next((value[key] for key in ("model_state_dict", "state_dict", "model", "sae") if key in value), value)
    return inner if isinstance(inner, dict) else value


def either_way(path, made):
    """A ValueError of one line, or an SAE that works: never another error, never NaN."""
    message = None
    try:
        plain = read(path, assume=made.assume)
    except ValueError as error:
        message = str(error)
    assert "\n" not in (message or "")
    assert message is not None or forward(plain, rows()).isfinite().all()
    return message


def changed(name, change):
    """(made, key) with each of its tensors changed, one after another."""
    keys = list(tensors_in(ALL[name](torch.float32).files[ALL[name](torch.float32).tensor_file]))
    for key in keys:
        made = ALL[name](torch.float32)
        tensors = tensors_in(made.files[made.tensor_file])
        if isinstance(tensors[key], Tensor):
            new = change(tensors[key])
            tensors.pop(key) if new is None else tensors.__setitem__(key, new)
            yield made, key


CHANGES = {
    "missing": lambda tensor: None,
    "longer": lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor.reshape(1, 1),
    "flat": lambda tensor: tensor.reshape(-1)[None],
    "empty": lambda tensor: tensor.flatten()[:0],
    "NaN": lambda tensor: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor,
    "inf": lambda tensor: torch.full_like(tensor, torch.inf) if tensor.is_floating_point() else tensor,
    "whole numbers": lambda tensor: torch.ones_like(tensor, dtype=torch.int32),
    "complex": lambda tensor: torch.ones_like(tensor, dtype=torch.complex64),
}


# All readers take tensors through one function, so rarer kinds are tried on a few of them.
FEW = ("llamascopium-jumprelu-dataset-wise-True", "archetypal-topk")
KINDS = [(name, kind) for name in NAMES for kind in CHANGES if kind in ("missing", "longer", "NaN") or name in FEW]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_tensors(tmp_path, name, kind):
    n_refused = 0
    for n, (made, _) in enumerate(changed(name, CHANGES[kind])):
        n_refused += either_way(made.write(tmp_path / str(n)), made) is not None
    assert n_refused >= 2  # statistics and counts beside the weights may be anything


@pytest.mark.parametrize("value", ["text", {"a": 1}], ids=repr)
@pytest.mark.parametrize("name", [name for name in NAMES if "pt" in ALL[name](torch.float32).tensor_file])
def test_what_is_no_tensor(tmp_path, name, value):
    if not ALL[name](torch.float32).tensor_file.endswith((".pt", ".pth")):
        pytest.skip("these files hold tensors alone")
    for n, (made, _) in enumerate(changed(name, lambda _: value)):
        either_way(made.write(tmp_path / str(n)), made)


GOODFIRE = {
    "encoder_linear.weight": ("d_sae", "d_in"),
    "encoder_linear.bias": ("d_sae",),
    "decoder_linear.weight": ("d_in", "d_sae"),
    "decoder_linear.bias": ("d_in",),
}


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    """2 KB, in which one number stands for 2^35."""
    sizes = {"d_in": 4, "d_sae": 1 << 33}
    huge = {key: torch.zeros(1).expand(*(sizes[size] for size in shape)) for key, shape in GOODFIRE.items()}
    torch.save(huge, tmp_path / "huge.pt")
    assert (tmp_path / "huge.pt").stat().st_size < 4096
    message = "encoder_linear.weight has 34,359,738,368 numbers, of which the file holds 1"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "huge.pt")
    torch.save({key: each[(slice(9),) * each.dim()] for key, each in huge.items()}, tmp_path / "small.pt")
    assert read(tmp_path / "small.pt").d_sae == 9, "a few may be"


@pytest.mark.parametrize("kind", ["sparse", "meta", "nested"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_other_layouts(tmp_path, kind):
    tensors = {key: torch.rand([{"d_in": 4, "d_sae": 9}[size] for size in shape]) for key, shape in GOODFIRE.items()}
    weight = tensors["encoder_linear.weight"]
    made = {"sparse": weight.to_sparse(), "meta": weight.to("meta"), "nested": torch.nested.nested_tensor([weight])}
    torch.save(tensors | {"encoder_linear.weight": made[kind]}, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match=r"encoder_linear\.weight is sparse, nested or without numbers"):
        read(tmp_path / "sae.pt")


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_every_wrong_kind(tmp_path, name):
    made = ALL[name](torch.float32)
    for settings in [file for file in made.files if file.endswith((".json", ".yaml"))]:
        for n, key in enumerate(made.files[settings]):
            for m, value in enumerate((None, -1, "x", [], 10**30)):
                made = ALL[name](torch.float32)
                made.files[settings] = {**made.files[settings], key: value}
                either_way(made.write(tmp_path / f"{n}-{m}"), made)
            made = ALL[name](torch.float32)
            del made.files[settings][key]
            either_way(made.write(tmp_path / f"{n}"), made)


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_are_no_settings(tmp_path, name):
    made = ALL[name](torch.float32)
    for settings in [file for file in made.files if file.endswith((".json", ".yaml"))]:
        for n, data in enumerate((b"", b"[1]", b"\xff\xfe", b"{", b'{"a": NaN}', DEEP, b"&a [*a]", b"a: &a {b: *a}")):
            made.files[settings] = data
            assert either_way(made.write(tmp_path / str(n)), made) is not None


@pytest.mark.parametrize("name", NAMES)
def test_truncated(tmp_path, name):
    made = ALL[name](torch.float32)
    path = made.write(tmp_path)
    file = tmp_path / made.tensor_file
    data = file.read_bytes()
    for length in (0, 10, len(data) - 1):
        file.write_bytes(data[:length])
        assert either_way(path, made) is not None
    file.write_bytes(b"\x80\x02" + data)
    assert either_way(path, made) is not None


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if ALL[name](torch.float32).tensor_file.endswith(("pt", "pth"))]
)
def test_a_pickle_that_runs_a_command_does_not(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    made = ALL[name](torch.float32)
    value = made.files[made.tensor_file]
    value["cfg"] = Attack()
    message = either_way(made.write(tmp_path), made)
    assert message is not None
    assert "system" in message
    assert not (tmp_path / "attacked").exists()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


ARRAYS = {
    "W_enc": np.zeros((3, S)),
    "b_enc": np.zeros(S),
    "W_dec": np.zeros((S, 3)),
    "b_dec": np.zeros(3),
    "threshold": np.zeros(S),
}


@pytest.mark.parametrize(
    "kind", ["pickled", "objects", "text", "whole", "no npz", "plain pickle", "lying header", "big"]
)
def test_npz(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    data = npz(**ARRAYS)
    if kind == "pickled":
        data = npz(**{**ARRAYS, "W_enc": np.array([Attack()], dtype=object)})
    elif kind == "objects":
        data = npz(**{**ARRAYS, "more": np.array([{}], dtype=object)})
    elif kind == "text":
        data = npz(**{**ARRAYS, "b_enc": np.array(["a"] * S)})
    elif kind == "whole":
        data = npz(**{**ARRAYS, "b_enc": np.zeros(S, dtype=np.int64)})
    elif kind == "no npz":
        data = b"hello"
    elif kind == "plain pickle":
        data = pickle.dumps(Attack())
    elif kind == "lying header":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in ARRAYS.items():
                inner = io.BytesIO()
                np.save(inner, array)
                text = inner.getvalue().replace(b"(3, 20)", b"(10**9,)"[:7])
                archive.writestr(f"{name}.npy", text.replace(b"'shape': (20,)", b"'shape': (10**12,)"[:14]))
        data = file.getvalue()
    else:
        file = io.BytesIO()
        np.savez_compressed(file, **{**ARRAYS, "W_enc": np.zeros((1, 5_000_000))})
        data = file.getvalue()
    save(tmp_path / "params.npz", data)
    with pytest.raises(ValueError, match=r"params\.npz: ") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("named", [each.name for each in FORMATS])
def test_files_of_another_format_than_the_one_that_is_named(tmp_path, named):
    """Read, or refused in words: also a folder without files, and settings without weights."""
    paths = [tmp_path / "empty", tmp_path / "settings"]
    for path in paths:
        path.mkdir()
    (tmp_path / "settings" / "config.json").write_text('{"k": 3}')
    (tmp_path / "settings" / "cfg.json").write_text('{"d_in": 3, "d_sae": 4, "architecture": "topk"}')
    makers = [ALL[name] for name in NAMES] + list(
        {name.split(":")[0]: make for name, make in TRAINERS.items()}.values()
    )
    paths += [make(torch.float32).write(tmp_path / str(i)) for i, make in enumerate(makers)]
    refused: list[str] = []
    for path in paths:
        for more in ({}, {"k": 2, "activation": "topk"}):
            try:
                read(path, assume={"format": named, **more})
            except (ValueError, OSError) as error:
                refused.append(str(error))
    assert len(refused) > len(paths)
    assert all(str(tmp_path) in message for message in refused), refused
