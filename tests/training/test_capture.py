"""Steps in CUDA graphs: the eager steps' bits, and eager steps wherever a replay would be wrong."""

import runpy
from contextlib import nullcontext
from dataclasses import is_dataclass, replace
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.kernels.cpu_loops import in_parts, numba_is_here
from saevlm_fast.training.capture import CapturedSteps, told_of_compiling
from saevlm_fast.training.dead_latents import padded_size
from saevlm_fast.training.run import train
from saevlm_fast.training.step import Stepper
from test_step import make

ARCHITECTURES = ["topk", "batch_topk", "matryoshka"]


def on_gpu(architecture, device, **settings):
    stepper, _, data = make(architecture, **settings)
    return Stepper(stepper.sae.to(device), stepper.config), data.to(device)


def same_state(one, other):
    assert torch.equal(one.idle_S, other.idle_S)
    assert torch.equal(one.sae.threshold, other.sae.threshold)
    for name, parameter in one.parameters().items():
        assert torch.equal(other.parameters()[name], parameter), name
        for moment, other_moment in zip(one.moments[name], other.moments[name]):
            assert torch.equal(moment, other_moment), f"moments of {name}"


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dead_after", [10_000_000, 400], ids=["no-dead", "auxk"])
def test_captured_steps_are_the_eager_steps(device, architecture, dead_after):
    eager, data = on_gpu(architecture, device, dead_after=dead_after)
    captured, _ = on_gpu(architecture, device, dead_after=dead_after)
    steps = CapturedSteps(captured)
    for start in range(0, 40 * 61, 61):
        x = data[start : start + 61]
        expected, found = eager.step(x), steps.step(x)
        assert torch.equal(expected.losses.overall, found.losses.overall), f"step {start // 61}"
        assert int(expected.n_dead) == int(found.n_dead)
        assert torch.equal(expected.x_hat_BD, found.x_hat_BD)
    same_state(eager, captured)
    assert steps.n_replayed >= 30, f"{steps.n_eager} eager, {steps.n_captured} graphs"


@pytest.mark.gpu
def test_other_batches_and_changes_from_outside_are_seen(device):
    eager, data = on_gpu("batch_topk", device)
    captured, _ = on_gpu("batch_topk", device)
    steps = CapturedSteps(captured)
    sizes = [61] * 6 + [40] * 6 + [61, 40] * 3
    for number, size in enumerate(sizes):
        if number in (5, 11):  # in place
            for stepper in (eager, captured):
                with torch.no_grad():
                    stepper.sae.W_enc.mul_(1.01)
        if number == 14:  # elsewhere
            for stepper in (eager, captured):
                stepper.moments["b_enc"] = tuple(t.clone() for t in stepper.moments["b_enc"])
                stepper.idle_S = stepper.idle_S.clone()
        x = data[number * 61 : number * 61 + size]
        assert torch.equal(eager.step(x).losses.overall, steps.step(x).losses.overall), number
    same_state(eager, captured)
    assert steps.n_replayed >= 8
    codes = captured.sae.encode(data[:10])  # whoever keeps something by W_enc's version sees that it moved
    assert torch.equal(codes.top_acts, eager.sae.encode(data[:10]).top_acts)


@pytest.mark.gpu
def test_captured_steps_do_not_wait_for_the_host(device):
    stepper, data = on_gpu("batch_topk", device, dead_after=400)
    steps = CapturedSteps(stepper)
    for start in range(0, 24 * 61, 61):
        steps.step(data[start : start + 61])
    replayed = steps.n_replayed
    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in range(0, 4 * 61, 61):
            steps.step(data[start : start + 61])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps.n_replayed == replayed + 4


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_is_eager(device):
    stepper, data = on_gpu("topk", device)
    device_step, n_read = stepper.device_step, []

    def reads_the_loss(x_BD, e_BE):
        output = device_step(x_BD, e_BE)
        n_read.append(float(output.losses.overall))
        return output

    stepper.device_step = reads_the_loss
    steps, (expected, _) = CapturedSteps(stepper), on_gpu("topk", device)
    for start in range(0, 2 * 61, 61):
        steps.step(data[start : start + 61])
        expected.step(data[start : start + 61])
    with pytest.warns(UserWarning, match="steps are not captured in a CUDA graph"):
        steps.step(data[122:183])
    expected.step(data[122:183])
    for start in range(183, 8 * 61, 61):
        steps.step(data[start : start + 61])
        expected.step(data[start : start + 61])
    same_state(expected, stepper)
    assert steps.n_replayed == 0


def keep(logged, step, metrics):
    logged.append(metrics)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_runs_are_the_same_wherever_data_is_and_however_steps_are_taken(architecture, dtype, tmp_path):
    x_ND = torch.from_numpy(PlantedConcepts(32, 8, 60, seed=3).sample(1500)[0]).to(dtype)
    config = SAEConfig.sized(32, expansion=8, k=6, architecture=architecture)
    recipe = TrainConfig(steps=60, batch_size=128, lr=3e-3, dead_after=2000)
    found = {}
    for name, options in {
        "device": {"data_on": "device"},
        "host": {"data_on": "host"},
        "eager": {"data_on": "device", "capture": False},
        "host, eager": {"data_on": "host", "capture": False},
    }.items():
        logged: list = []
        options = RunOptions(device="cuda", **options)
        sae, metrics = train(Activations.from_tensor(x_ND), config, recipe, options, on_log=partial(keep, logged))
        share = [metrics.pop("details/eager_share") for metrics in logged][-1]
        assert share == 1 if "eager" in name else share < 0.5, (name, share)
        found[name] = sae.state_dict(), metrics, logged
    for name, (state, metrics, logged) in found.items():
        assert logged == found["device"][2], name
        for key, tensor in state.items():
            assert torch.equal(tensor, found["device"][0][key]), (name, key)
        assert metrics == found["device"][1], name


@pytest.mark.gpu
@pytest.mark.parametrize("data_on", ["device", "host"])
def test_a_run_resumed_in_the_middle_ends_the_same(data_on, tmp_path):
    x_ND = torch.from_numpy(PlantedConcepts(32, 8, 60, seed=3).sample(1500)[0])
    config, recipe = SAEConfig.sized(32, expansion=8, k=6), TrainConfig(steps=60, batch_size=128, lr=3e-3)

    class Stop(Exception):
        pass

    def stop(step):
        if step == 33:
            raise Stop

    whole, _ = train(Activations.from_tensor(x_ND), config, recipe, device="cuda", data_on=data_on)
    options = {"output": tmp_path / "run", "device": "cuda", "data_on": data_on, "checkpoint_every": 10}
    with pytest.raises(Stop):
        train(Activations.from_tensor(x_ND), config, recipe, RunOptions(**options), on_step=stop)
    resumed, _ = train(Activations.from_tensor(x_ND), config, recipe, RunOptions(**options, resume=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_lengths_of_the_list_of_dead_latents_are_few_and_near():
    assert [padded_size(bound, 65536) for bound in (0, 1, 256, 257, 4000, 4096, 4097)] == [
        0, 256, 256, 512, 4096, 4096, 4608,
    ]  # fmt: skip
    assert padded_size(300, 301) == 301
    for d_sae in (1000, 65536):
        sizes = {bound: padded_size(bound, d_sae) for bound in range(d_sae + 1)}
        assert all(bound <= size <= d_sae and size - bound < max(256, bound / 8 + 1) for bound, size in sizes.items())
        assert len(set(sizes.values())) <= 50


# Without a GPU: when steps are captured and when they are not ------------------------------------------------------


class FakeGraph:
    """Replays what was done while it was captured."""

    def replay(self):
        self.calls()


class FakeCapture:
    fails = False

    def __init__(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local", "loader threads go on meanwhile"
        self.graph = graph

    def __enter__(self):
        if self.fails:
            raise RuntimeError("operation not permitted\nwhile a stream is capturing")

    def __exit__(self, *exception):
        self.graph.calls = lambda: None


class FakeStepper:
    """On no device at all: notes how its steps were taken."""

    def __init__(self):
        self.W_dec, self.config = torch.zeros(5, 3), SimpleNamespace(accumulate=1)
        self.sae = SimpleNamespace(W_dec=self.W_dec, threshold=torch.zeros(()))
        self.idle_S = SimpleNamespace(is_cuda=True, device="cuda", data_ptr=lambda: 1)
        self.bad_step, self.moments = torch.zeros(()), {}
        self.step_index, self.adam_schedule = torch.zeros(()), torch.zeros(2)
        self.low = SimpleNamespace(weights=None, is_current=lambda: self.current)
        self.n_listed, self.current, self.taken, self.penalised, self.cone = 0, True, [], False, None
        self.sparsity, self.group_ends_G = torch.ones(()), torch.zeros(1)
        self.asked, self.capturable = None, True

    def parameters(self):
        return {"W_dec": self.W_dec}

    def announce(self, n_rows):
        self.taken.append("announced")

    def can_be_captured(self, x_BD):
        return self.capturable

    def device_step(self, x_BD, e_BE=None):
        self.taken[-1] = "eager" if self.taken[-1] == "announced" else "both"
        return len(x_BD)

    def was_replayed(self):
        self.taken[-1] = "replayed"


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(FakeCapture, "fails", False)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)


def take(steps, n, n_rows=4, **changes):
    """How n steps on n_rows rows were taken."""
    for name, value in changes.items():
        setattr(steps.stepper, name, value)
    before = len(steps.stepper.taken)
    outputs = [steps.step(torch.zeros(n_rows, 3)) for _ in range(n)]
    assert outputs == [n_rows] * n
    return " ".join(steps.stepper.taken[before:])


@pytest.mark.usefixtures("fake_gpu")
def test_shapes_are_captured_once_after_two_eager_steps():
    steps = CapturedSteps(FakeStepper())
    assert take(steps, 4) == "eager eager replayed replayed"
    assert take(steps, 3, n_listed=256) == "eager eager replayed"
    assert take(steps, 2, n_listed=0) == "replayed replayed"
    assert take(steps, 3, n_rows=2) == "eager eager replayed"
    assert take(steps, 1, n_rows=4) == "replayed"
    assert (steps.n_eager, steps.n_replayed, steps.n_captured) == (6, 7, 3)
    assert steps.metrics() == {"details/eager_share": 6 / 13}


@pytest.mark.usefixtures("fake_gpu")
def test_what_a_replay_would_not_see_is_stepped_eagerly_or_captured_anew():
    steps = CapturedSteps(FakeStepper())
    take(steps, 3)
    assert take(steps, 1, current=False) == "eager"
    assert take(steps, 1, current=True) == "replayed"
    assert steps.n_captured == 1
    assert take(steps, 1, bad_step=torch.zeros(())) == "replayed"
    assert steps.n_captured == 2


def rooms(of):
    """Where in a tuple or a dataclass tensors are, as the names or places that lead there."""
    if isinstance(of, torch.Tensor):
        return [()]
    named = enumerate(of) if isinstance(of, tuple) else vars(of).items() if is_dataclass(of) else ()
    return [(name, *more) for name, each in named for more in rooms(each)]


def with_other(of, room):
    """The same, with a copy of one tensor, elsewhere in memory."""
    if not room:
        return of.clone()
    first, *more = room
    if isinstance(of, tuple):
        return type(of)(*(with_other(each, more) if i == first else each for i, each in enumerate(of)))
    return replace(of, **{first: with_other(getattr(of, first), more)})


@pytest.mark.usefixtures("fake_gpu")
def test_whatever_a_penalised_step_has_asked_with_is_captured_anew_elsewhere():
    """The graph of its second part has all their addresses."""
    pytest.importorskip("triton")
    from saevlm_fast.kernels.topk_encode_cuda import Candidates, Centred
    from saevlm_fast.kernels.topk_encode_list_triton import Pool
    from saevlm_fast.kernels.topk_encode_screen_triton import Screen
    from saevlm_fast.training.gpu_codes import Asked

    memory = iter(torch.zeros(40).split(1))
    pool, centred = Pool(*islice(memory, 7)), Centred(*islice(memory, 2))
    screen = Screen(*islice(memory, 7), 64, 128, *islice(memory, 2))
    steps = CapturedSteps(FakeStepper())
    asked = Asked(Candidates(screen, pool, *islice(memory, 4)), centred)
    steps.stepper.asked = asked
    before = steps._addresses()
    assert steps._addresses() == before
    assert len(rooms(asked)) == 22
    for room in rooms(asked):
        steps.stepper.asked = with_other(asked, room)
        assert steps._addresses() != before, room
    steps.stepper.asked = asked
    for name in ("sparsity", "group_ends_G"):
        setattr(steps.stepper, name, getattr(steps.stepper, name).clone())
        assert steps._addresses() != before, name
        before = steps._addresses()


@pytest.mark.usefixtures("fake_gpu")
def test_what_asks_the_host_on_its_way_is_not_tried(recwarn):
    """Neither captured, nor in the way of what can be."""
    steps = CapturedSteps(FakeStepper())
    assert take(steps, 4, capturable=False) == "eager eager eager eager"
    assert (steps.n_captured, steps.n_eager) == (0, 4)
    assert take(steps, 3, capturable=True) == "eager eager replayed"
    assert not recwarn.list


def on_gpu_by_name(x_BD):
    """A batch that says it is on one."""
    return SimpleNamespace(is_cuda=True, shape=x_BD.shape)


@pytest.mark.parametrize(("accumulate", "width", "can_be"), [(2, 8193, False), (2, 8192, True), (1, 8193, True)])
def test_micro_batches_too_wide_for_the_kernels_cannot_be_captured(accumulate, width, can_be):
    pytest.importorskip("triton")
    stepper, _, _ = make("topk", accumulate=accumulate)
    x_BD = torch.zeros(2, 1).expand(2, width)
    assert stepper.can_be_captured(on_gpu_by_name(x_BD)) == can_be
    assert stepper.can_be_captured(x_BD), "a CPU captures nothing, and has no Triton perhaps"


@pytest.mark.usefixtures("fake_gpu")
def test_few_graphs_are_kept():
    steps = CapturedSteps(FakeStepper())
    for n_listed in range(12):
        take(steps, 3, n_listed=n_listed)
    assert len(steps._graphs) == 8
    assert steps.n_captured == 12
    assert take(steps, 1, n_listed=11) == "replayed"
    assert steps.n_captured == 12
    take(steps, 1, n_listed=0)
    assert steps.n_captured == 13


@pytest.mark.usefixtures("fake_gpu")
def test_a_capture_that_fails_is_told_once_and_not_tried_again(monkeypatch):
    steps = CapturedSteps(FakeStepper())
    monkeypatch.setattr(FakeCapture, "fails", True)
    take(steps, 2)
    with pytest.warns(UserWarning, match="not captured in a CUDA graph: operation not permitted$"):
        assert take(steps, 1) == "eager"
    assert take(steps, 3) == "eager eager eager"
    assert steps.n_captured == 0


def test_a_cpus_steps_and_those_that_are_not_to_be_captured_are_eager():
    stepper, _, data = make("topk")
    steps = CapturedSteps(stepper)
    for _ in range(4):
        assert steps.input(61) is None
        assert steps.step(data[:61]).x_hat_BD.shape == (61, 24)
    assert (steps.n_eager, steps.n_replayed, steps.metrics()) == (4, 0, {})
    fake = CapturedSteps(FakeStepper(), capture=False)
    fake.stepper.idle_S = torch.zeros(5)
    assert take(fake, 4) == "eager eager eager eager"


@pytest.mark.usefixtures("fake_gpu")
def test_a_batch_that_does_not_fit_is_refused_before_anything_moves():
    steps = CapturedSteps(FakeStepper())
    with pytest.raises(ValueError, match=r"x_BD: shape is \[4, 2\]; \[4, 3\] is needed"):
        steps.step(torch.zeros(4, 2))
    assert steps.stepper.taken == []


@pytest.mark.skipif(not numba_is_here(), reason="no numba on this machine")
def test_the_first_loop_of_a_cpu_that_is_compiled_is_told_of(tmp_path):
    """Not one whose code is on the disk, nor any once nobody listens."""
    file, told = tmp_path / "fresh_loop.py", "compiling kernels; where possible they are kept for the next run"
    file.write_text(
        "from saevlm_fast.kernels.cpu_loops import compiled\n"
        "@compiled\ndef loop(seen_N, start, stop):\n    for n in range(start, stop):\n        seen_N[n] += 1\n"
    )

    def notes(dtype):
        heard = []
        with told_of_compiling(heard.append):
            loop = runpy.run_path(str(file))["loop"]
            for _ in range(2):
                in_parts(loop, [0, 3], torch.zeros(3, dtype=dtype))
            in_parts(loop, [0, 3], torch.zeros(3, dtype=torch.int64))
        return heard

    assert notes(torch.float32) == [told]
    assert notes(torch.float32) == []
    assert notes(torch.float64) == [told]
    with told_of_compiling(lambda note: pytest.fail("told after the end")):
        loop = runpy.run_path(str(file))["loop"]
    in_parts(loop, [0, 3], torch.zeros(3, dtype=torch.int32))


def test_the_first_kernel_that_is_compiled_is_told_of_once():
    knobs = pytest.importorskip("triton").knobs
    notes, heard, before = [], [], knobs.compilation.listener

    def compiled(cache_hit):
        knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)

    knobs.compilation.listener = lambda **compiled: heard.append(compiled["cache_hit"])
    try:
        with told_of_compiling(notes.append):
            compiled(True)
            assert notes == []
            compiled(False)
            compiled(False)
        assert notes == ["compiling kernels; where possible they are kept for the next run"]
        compiled(False)
    finally:
        knobs.compilation.listener = before
    assert heard == [True, False, False, False], "who listened before still does"
    assert len(notes) == 1
