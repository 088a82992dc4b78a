"""Every format of other libraries: found, read, and equal to its library's own forward, several configurations each.

Files and forwards are written from each library's code (tests/helpers/foreign_*.py). The same with files that the real
libraries wrote is in tests/formats/interop.
"""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreign_files
import foreign_language
import foreign_vision
from foreign_files import TOLERANCE, assert_close, assert_same, rows
from foreign_language import ALL
from foreign_trainers import TRAINERS
from saevlm_fast.errors import Doubt
from saevlm_fast.formats.registry import FORMATS, detect, read
from saevlm_fast.formats.source import Source
from saevlm_fast.sae import SparseAutoencoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ALL)
def test_equal_to_its_librarys_own_forward(tmp_path, name, dtype):
    made = ALL[name](dtype)
    path = made.write(tmp_path)
    assert detect(Source(path, assume=made.assume)).name == made.format
    plain = read(path, assume=made.assume)
    is_float32 = dtype is torch.float32 or made.format == "visaebench"
    assert plain.W_enc.dtype == (torch.float32 if is_float32 else torch.float64)
    assert_same(plain, made, torch.float32 if is_float32 else dtype)
    assert plain.metadata["source_format"] in (made.format, "patch_sae")  # the latter is read as Prisma
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Doubt)
        sae = SparseAutoencoder.from_pretrained(path, assume=made.assume)
    assert_engine_same(sae, made)


def assert_engine_same(sae, made):
    """The module itself, in the file's dtype."""
    x_BD = rows()
    z_BS, x_hat_BD = made.forward(x_BD)
    kept_B = (z_BS >= 0).all(dim=1)  # rows without the negative latents that some libraries keep
    dtype = sae.W_enc.dtype
    x = x_BD[kept_B].to(dtype)
    with torch.no_grad():
        codes = sae.encode(x)
        ours_BS = codes.dense().double()
        ours_BD = sae(x).double()
    assert torch.equal(ours_BS != 0, z_BS[kept_B] != 0)
    assert_close(ours_BS * made.factor, z_BS[kept_B], TOLERANCE[dtype])
    assert_close(ours_BD, x_hat_BD[kept_B], TOLERANCE[dtype])


NARROW = [
    name
    for name in ALL
    if name.startswith(("llamascopium", "lm_saes", "goodfire", "deepseek", "qwen", "gemma", "over"))
]
NARROW += ["clip_topk_sae-True", "msae-TopKReLU-False-True", "prisma_gated-layer_norm"]


@pytest.mark.parametrize("name", [name for name in NARROW if "jump" not in name and "npz" not in name])
def test_what_is_folded_is_not_rounded_to_bfloat16(tmp_path, name):
    """Half of Hub's large files are bfloat16: changed weights are float32, as exact as float32 files'."""
    made = ALL[name](torch.bfloat16)
    plain = made.read(tmp_path)
    assert plain.W_enc.dtype == torch.float32
    assert_same(plain, made, torch.float32)


def test_every_format_is_tried():
    tried = {make(torch.float32).format for make in (*ALL.values(), *TRAINERS.values())}
    assert tried == {each.name for each in FORMATS} - {"safetensors"}  # plain tensors: no library's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sizes")


@given(name=st.sampled_from(sorted(ALL)), d_in=st.integers(2, 12), d_sae=st.integers(9, 30))
@settings(max_examples=30)
def test_sizes_of_any_kind(folder, name, d_in, d_sae):
    """Narrower than wide, wider than narrow, and square, where a matrix says nothing of which side is which."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (foreign_files, foreign_language, foreign_vision):
            patched.setattr(module, "D", d_in)
            patched.setattr(module, "S", d_sae)
        made = ALL[name](torch.float64)
        kept = folder / f"{name}-{d_in}-{d_sae}".replace("/", "-")
        is_nameless = made.format == "deepseek" or (made.format == "visaebench" and "simple" in name)
        if is_nameless and d_in == d_sae:
            with pytest.raises(ValueError, match="cannot be told"):
                made.read(kept)
            return
        assert_same(made.read(kept), made, torch.float32 if made.format == "visaebench" else torch.float64)
