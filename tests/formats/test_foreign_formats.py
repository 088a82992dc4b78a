"""Every format of other libraries: found, read, and equal to its library's own forward, several configurations each.

Files and forwards are written from each library's code (tests/helpers/foreign_*.py). The same with files that the real
libraries wrote is in tests/formats/interop.
"""

import pytest
import torch

from foreign_files import assert_same
from foreign_language import ALL
from saevlm_fast.formats.others import OTHERS
from saevlm_fast.formats.registry import detect, read
from saevlm_fast.formats.source import Source


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


def test_every_format_is_tried():
    assert {make(torch.float32).format for make in ALL.values()} == {each[0] for each in OTHERS}
