"""The pretended GPU: it computes what the CPU does, and finds what a GPU would not forgive."""

import contextlib
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("pretended_gpu.install" not in sys.modules, reason="bash tests/on_pretended_gpu.sh"),
]


@pytest.fixture
def other():
    torch.cuda.synchronize()
    yield torch.cuda.Stream()
    torch.cuda.synchronize()


@pytest.fixture
def race():
    from pretended_gpu.work import RaceError

    return RaceError


@pytest.fixture(autouse=True)
def others_are_not_blamed():
    """What a test has provoked."""
    from pretended_gpu.install import device

    yield
    with contextlib.suppress(AssertionError):
        torch.cuda.synchronize()
    device.faults.clear()


def captured():
    return torch.cuda.graph(torch.cuda.CUDAGraph())


def test_values_and_gradients_are_those_of_the_cpu():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        t = x.to(device).detach().requires_grad_()
        y = torch.where(t > 0, t, 2).pow(3)[[0, 2], 1:].sum() + torch.logsumexp(t @ t.T, 1).mean() % 7
        y.backward()
        scaled = torch.ldexp(t.detach(), torch.arange(5, device=device))
        found.append((y.detach().cpu(), t.grad.cpu(), (t[t > 0] * 3).sort().values.detach().cpu(), scaled.cpu()))
    for expected, there in zip(*found):
        torch.testing.assert_close(there, expected)


def test_tensors_of_the_host_beside_those_of_the_device_are_refused():
    there, here = torch.ones(4, device="cuda"), torch.ones(4)
    for mixed in (lambda: there + here, lambda: here[torch.zeros(2, dtype=torch.long, device="cuda")]):
        with pytest.raises(RuntimeError, match=r"is on .*, others on cuda:0"):
            mixed()
    assert float((there + torch.tensor(2.0)).sum()) == 12


def test_a_graph_computes_when_it_is_replayed_and_not_before():
    total, x = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += x
        doubled = total * 2
    assert total.tolist() == [0, 0, 0]
    assert doubled.tolist() != [2, 2, 2]
    for n in (1, 2):
        graph.replay()
        assert total.tolist() == [n] * 3
        assert doubled.tolist() == [2 * n] * 3
    x.fill_(5)
    graph.replay()
    assert total.tolist() == [7, 7, 7]


def test_what_waits_is_refused_within_a_capture():
    x = torch.ones(3, device="cuda")
    for waits in (x.sum().item, x.nonzero, x.cpu, lambda: x[x > 0], lambda: torch.ones(3).to("cuda")):
        with captured(), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            waits()


def test_launches_of_two_streams_are_in_order_only_by_events(other, race):
    x = torch.zeros(8, device="cuda")
    with torch.cuda.stream(other), pytest.raises(race, match=r"add_.* writes .* before or after (fill_|zero_)"):
        x.add_(1)
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x.add_(1)
    with pytest.raises(race, match=r"sum.* on stream 0x0 reads"):
        x.sum()
    torch.cuda.current_stream().wait_stream(other)
    assert float(x.sum()) == 8


def test_a_result_is_written_by_its_stream(other, race):
    x = torch.ones(8, device="cuda")
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        doubled = x * 2
    with pytest.raises(race, match=r"sum.* on stream 0x0 reads .* mul"):
        doubled.sum()


def test_a_column_of_pinned_memory_leaves_its_neighbours():
    pinned = torch.zeros(3, 2).pin_memory()
    pinned[:, 0].copy_(torch.ones(3, device="cuda"), non_blocking=True)
    torch.cuda.synchronize()
    assert pinned.tolist() == [[1, 0]] * 3


def test_two_streams_may_write_beside_each_other_and_read_the_same(other):
    x, y = torch.zeros(8, device="cuda"), torch.ones(4, device="cuda")
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x[:4].add_(y)
    x[4:].add_(y)
    torch.cuda.current_stream().wait_stream(other)
    assert float(x.sum()) == 8


def test_memory_that_another_stream_still_uses_is_given_to_nobody(other, race):
    """Without record_stream the allocator hands it out again at once."""
    x = torch.ones(1000, device="cuda")
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x.sum()
    del x
    with pytest.raises(race):
        torch.ones(500, device="cuda") + torch.ones(500, device="cuda")


def test_a_stream_that_a_graph_does_not_wait_for_is_found(other, race):
    x = torch.zeros(3, device="cuda")
    capture = captured()
    capture.__enter__()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x.add_(1)
    with pytest.raises(race, match="does not wait for"):
        capture.__exit__(None, None, None)


def test_pinned_memory_is_read_and_written_after_its_copy_alone(race):
    x, pinned = torch.arange(4.0, device="cuda"), torch.empty(4, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    assert pinned.tolist() != [0, 1, 2, 3]
    torch.cuda.current_stream().synchronize()
    assert pinned.tolist() == [0, 1, 2, 3]
    x.copy_(pinned, non_blocking=True)
    pinned[2] = 9
    with pytest.raises(race, match="was written before its copy was over"):
        torch.cuda.current_stream().synchronize()


def test_an_event_is_over_when_it_has_been_waited_for():
    x, pinned = torch.ones(4, device="cuda"), torch.empty(4, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    assert not event.query()
    assert pinned.tolist() != [1, 1, 1, 1]
    event.synchronize()
    assert event.query()
    assert pinned.tolist() == [1, 1, 1, 1]


def test_a_stream_is_over_when_it_is_asked_again():
    x, pinned = torch.ones(4, device="cuda"), torch.empty(4, pin_memory=True)
    stream = torch.cuda.current_stream()
    pinned.copy_(x, non_blocking=True)
    assert not stream.query()
    assert pinned.tolist() != [1, 1, 1, 1]
    assert stream.query()
    assert pinned.tolist() == [1, 1, 1, 1]
    x.add_(1)
    assert not stream.query()


def test_a_kernel_that_leaves_its_arguments_is_found():
    import triton
    import triton.language as tl
    from pretended_gpu.triton_kernels import OutOfBoundsError
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def ones(ptr, n, BLOCK: tl.constexpr):
        tl.store(ptr + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) < n)

    x = torch.zeros(5, device="cuda")
    ones[(1,)](x, 5, BLOCK=8)
    assert float(x.sum()) == 5
    with pytest.raises((InterpreterError, OutOfBoundsError), match="is in none of"):
        ones[(1,)](x, 6, BLOCK=8)
    there = torch.zeros(5, device="cuda:1")
    with pytest.raises(AssertionError, match=r"a tensor \[5\] is on cuda:1, and the launch is on cuda:0"):
        ones[(1,)](there, 5, BLOCK=8)
    with torch.cuda.device(1):
        ones[(1,)](there, 5, BLOCK=8)
    assert float(there.sum()) == 5


def test_tensors_of_two_devices_are_refused():
    here, there = torch.ones(4, device="cuda"), torch.ones(4, device="cuda:1")
    with pytest.raises(RuntimeError, match=r"add.Tensor: other \[4\] is on cuda:1, others on cuda:0"):
        here + there
    there.record_stream(torch.cuda.current_stream(1))
    assert there.sum().device == torch.arange(3, device="cuda:1").device == torch.device("cuda:1")


def test_a_copy_between_devices_is_in_order_with_both(other, race):
    here, there = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda:1")
    there.add_(1)
    there.copy_(here)
    with torch.cuda.stream(other), pytest.raises(race):
        here.add_(1)
    assert there.add_(here.to("cuda:1")).tolist() == [2, 2, 2, 2]


def test_one_device_is_not_waited_for_by_waiting_for_the_other():
    pinned = torch.zeros(2, 4, pin_memory=True)
    for number in (0, 1):
        pinned[number].copy_(torch.ones(4, device=f"cuda:{number}"), non_blocking=True)
    torch.cuda.synchronize(1)
    assert pinned[1].tolist() == [1] * 4 != pinned[0].tolist()
    torch.cuda.synchronize()
    assert pinned[0].tolist() == [1] * 4
