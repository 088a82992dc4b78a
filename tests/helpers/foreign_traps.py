"""A file of another library, and that it is refused by its name and reason."""

import pytest
import torch

from foreign_files import Made
from foreign_language import ALL
from saevlm_fast.formats.registry import read


def made(name) -> Made:
    return ALL[name](torch.float32)


def refused(one: Made, folder, why: str, **assume) -> None:
    path = one.write(folder)
    with pytest.raises(ValueError, match=why) as caught:
        read(path, assume=assume or one.assume)
    assert "\n" not in str(caught.value)
    assert str(path.name) in str(caught.value)
