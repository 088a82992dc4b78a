"""What long work asks of the process: precision of products, threads, defaults; and of several threads at once."""

import os
import signal
import threading

import pytest
import torch

from saevlm_fast import runtime
from saevlm_fast.runtime import _EXACT as EXACT
from saevlm_fast.runtime import (
    ProcessWide,
    exactly,
    float32_on_cpu,
    loading,
    one_thread,
    own_defaults,
    tf32_products,
)


@pytest.fixture(autouse=True)
def as_with_a_gpu(monkeypatch):
    """Precision is a setting of a GPU alone; torch keeps it without one."""
    monkeypatch.setattr("saevlm_fast.runtime._has_gpu", lambda: True)


@pytest.mark.parametrize(("wanted", "precision"), [(True, "tf32"), (False, "ieee")])
def test_products_and_convolutions_have_the_precision_asked_for_and_get_theirs_back(wanted, precision):
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [setting.fp32_precision for setting in settings]
    with tf32_products(wanted):
        assert [setting.fp32_precision for setting in settings] == [precision] * 3
    assert [setting.fp32_precision for setting in settings] == before


OF_CPU = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn)


@pytest.mark.parametrize("context", [own_defaults, float32_on_cpu, lambda: tf32_products(True)])
@pytest.mark.parametrize("rough", ["bf16", "tf32"])
def test_products_of_a_cpu_are_exact_and_get_their_precision_back(context, rough):
    before = [setting.fp32_precision for setting in OF_CPU]
    try:
        for setting in OF_CPU:
            setting.fp32_precision = rough
        with context():
            assert [setting.fp32_precision for setting in OF_CPU] == ["ieee"] * 3
        assert [setting.fp32_precision for setting in OF_CPU] == [rough] * 3
    finally:
        for setting, precision in zip(OF_CPU, before):
            setting.fp32_precision = precision


@pytest.mark.parametrize(
    "given", [{"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}, {"rough": True}, {}], ids=str
)
def test_exactly_looks_before_it_sets(given, monkeypatch):
    """And sets whatever is not so: the default device has its test in test_torch_defaults.py."""
    entered = []
    own = runtime._own_numbers
    monkeypatch.setattr(runtime, "_own_numbers", lambda: entered.append(1) or own())

    @exactly
    def look(x, y=2):
        return x + y, torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), OF_CPU[0].fp32_precision in EXACT

    before = torch.get_default_dtype()
    torch.set_default_dtype(given.get("dtype", before))
    torch.set_float32_matmul_precision("medium" if "rough" in given else "highest")
    try:
        with torch.autocast("cpu", given.get("autocast"), enabled="autocast" in given):
            assert look(1, y=3) == (4, torch.float32, False, True)
    finally:
        torch.set_default_dtype(before)
        torch.set_float32_matmul_precision("highest")
    assert bool(entered) == bool(given)


def test_a_precision_that_follows_another_still_does():
    """torch.backends.mkldnn.fp32_precision is that of all products on a CPU, while they have none of their own."""
    before = torch.backends.mkldnn.fp32_precision
    own = [setting.fp32_precision for setting in OF_CPU]
    try:
        for setting in OF_CPU:
            setting.fp32_precision = "none"
        torch.backends.mkldnn.fp32_precision = "bf16"
        with own_defaults(), tf32_products(False):
            assert [setting.fp32_precision for setting in OF_CPU] == ["ieee"] * 3
        assert [setting.fp32_precision for setting in OF_CPU] == ["bf16"] * 3
        torch.backends.mkldnn.fp32_precision = "ieee"
        assert [setting.fp32_precision for setting in OF_CPU] == ["ieee"] * 3
    finally:
        torch.backends.mkldnn.fp32_precision = before
        for setting, precision in zip(OF_CPU, own):
            setting.fp32_precision = precision


def test_exactly_does_not_lean_on_what_another_thread_needs():
    """Which may end in the middle."""
    within, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with own_defaults():
            within.set()
            leave.wait(30)

    @exactly
    def work(thread):
        for step in (leave.set, thread.join):
            seen.append((OF_CPU[0].fp32_precision, torch.get_default_dtype()))
            step()
        seen.append((OF_CPU[0].fp32_precision, torch.get_default_dtype()))

    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.bfloat16)
    try:
        thread = threading.Thread(target=other)
        thread.start()
        assert within.wait(30)
        work(thread)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    assert seen == [("ieee", torch.float32)] * 3


def test_exactly_is_traced_as_the_function_that_it_is():
    product = exactly(lambda x: x @ x + 1)
    x = torch.randn(4, 4)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), product(x))


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


def test_one_thread_within_one_thread_leaves_the_outer_one_as_it_is():
    """As the measurement that decides for screening, in the first step of a small run."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread(True):
            with one_thread(True):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def precisions():
    return [setting.fp32_precision for setting in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)]


class Overlapping:
    """Two threads within `context`; the first one leaves while the second one is inside."""

    def __init__(self, context):
        self.context, self.inside = context, [threading.Event(), threading.Event()]
        self.leave, self.seen = [threading.Event(), threading.Event()], [None, None]
        self.threads = [threading.Thread(target=self.work, args=(i,)) for i in range(2)]

    def work(self, i):
        with self.context():
            self.inside[i].set()
            self.leave[i].wait(30)
            self.seen[i] = precisions(), torch.get_default_dtype()

    def run(self):
        for thread, inside in zip(self.threads, self.inside):
            thread.start()
            assert inside.wait(30)
        for thread, leave in zip(self.threads, self.leave):
            leave.set()
            thread.join(30)
        return self.seen


def test_threads_that_overlap_put_back_what_the_first_one_found():
    before = precisions()
    assert [seen[0] for seen in Overlapping(lambda: tf32_products(False)).run()] == [["ieee"] * 2] * 2
    assert precisions() == before
    torch.backends.cudnn.allow_tf32  # noqa: B018 - raises if torch's settings contradict each other

    torch.set_default_dtype(torch.float64)
    try:
        assert [seen[1] for seen in Overlapping(own_defaults).run()] == [torch.float32] * 2
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_that_begin_later_have_as_many_as_before():
    before, later = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        Overlapping(lambda: one_thread(True)).run()
        assert torch.get_num_threads() == 2
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join(30)
        assert later == [2]
    finally:
        torch.set_num_threads(before)


def test_who_needs_another_value_waits():
    inside, seen = threading.Event(), []

    def other():
        with tf32_products(True):
            seen.append(precisions())
            inside.set()

    before, thread = precisions(), threading.Thread(target=other)
    with tf32_products(False):
        thread.start()
        assert not inside.wait(0.2)
        with tf32_products(False):
            assert precisions() == ["ieee"] * 2
    assert inside.wait(30)
    thread.join(30)
    assert seen == [["tf32"] * 2]
    assert precisions() == before


def test_a_value_within_another_one_changes_it_for_nobody_else():
    """Two threads that go in and out of the other value: each sees what it needs, and neither waits for ever."""
    before, wrong, n_done = precisions(), [], []

    def work():
        with tf32_products(False):
            for _ in range(50):
                wrong.extend([] if precisions() == ["ieee"] * 2 else ["outside"])
                with tf32_products(True):
                    wrong.extend([] if precisions() == ["tf32"] * 2 else ["inside"])
        n_done.append(1)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(n_done), wrong, precisions()) == (3, [], before)


def test_what_is_left_in_another_thread_or_interrupted_as_it_begins_is_put_back(monkeypatch):
    before, setting = precisions(), ProcessWide(lambda: value[0], lambda new: value.__setitem__(0, new))
    value = ["before"]
    context = setting.at("within")
    context.__enter__()
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join(30)
    assert value == ["before"]
    interrupted = setting.at("within")
    with monkeypatch.context() as patch:
        hold = ProcessWide._hold

        def interrupted_there(*given):
            hold(*given)
            raise KeyboardInterrupt

        patch.setattr(ProcessWide, "_hold", interrupted_there)
        with pytest.raises(KeyboardInterrupt):
            interrupted.__enter__()
    assert value == ["before"]
    with setting.at("again"):
        assert value == ["again"]
    assert (value, precisions()) == (["before"], before)


def test_without_a_gpu_nobody_waits(monkeypatch):
    monkeypatch.setattr("saevlm_fast.runtime._has_gpu", lambda: False)
    before, inside = precisions(), threading.Event()

    def other():
        with tf32_products(True):
            inside.set()

    thread = threading.Thread(target=other)
    with tf32_products(False):
        assert precisions() == before
        thread.start()
        assert inside.wait(30)
    thread.join(30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_waits_for_no_thread_that_it_does_not_have():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with tf32_products(True), loading():
            inside.set()
            leave.wait(30)

    before, thread = precisions(), threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        sound = precisions() == before
        with loading():
            pass
        with tf32_products(False):
            sound = sound and precisions() == ["ieee"] * 2
        os._exit(0 if sound and precisions() == before else 1)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    thread.join(30)
    assert precisions() == before
