"""What long work asks of the process: precision of products."""

import pytest
import torch

from saevlm_fast.runtime import one_thread, tf32_products


@pytest.mark.parametrize(("wanted", "precision"), [(True, "tf32"), (False, "ieee")])
def test_products_and_convolutions_have_the_precision_asked_for_and_get_theirs_back(wanted, precision):
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    with tf32_products(wanted):
        assert [setting.fp32_precision for setting in settings] == [precision] * 2
    assert [setting.fp32_precision for setting in settings] == before


def test_one_thread_is_given_back_even_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread(True):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), one_thread(True):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
        with one_thread(False):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
