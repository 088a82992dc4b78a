"""Where rows are kept: by the memory that is free, by arithmetic that messages show; a run is the same either way."""

import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from held_memory import HeldMemory

from saevlm_fast import outputs
from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.errors import Doubt, size_text
from saevlm_fast.peers import Alone, Ranks
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training import dead_latents, memory, sharded_dead
from saevlm_fast.training.checkpoints import RunDirectory
from saevlm_fast.training.dead_latents import DeadLatents, auxiliary
from saevlm_fast.training.many import train_many
from saevlm_fast.training.memory import (
    Written,
    auxiliary_memory,
    memory_of,
    most_memory_of,
    rows_go_to_device,
    training_memory,
)
from saevlm_fast.training.run import train
from saevlm_fast.training.scale import Scale
from saevlm_fast.training.state import TrainingState
from saevlm_fast.training.step import Stepper

SAE = SAEConfig.sized(16, expansion=4, k=4)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def x_ND():
    return torch.from_numpy(PlantedConcepts(16, 8, 30, seed=3).sample(1500)[0])


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False)])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2), (torch.float32, 4), (torch.float64, 4)])
def test_rows_fit_beside_what_training_takes(x_ND, monkeypatch, dtype, size, missing, fits):
    data, config = Activations.from_tensor(x_ND.to(dtype)), TrainConfig(batch_size=128, steps=10)
    needed = 1500 * 16 * size + training_memory(SAE, 128)
    monkeypatch.setattr(memory, "free_memory", lambda device: needed - missing)
    assert rows_go_to_device(data, SAE, config, CUDA, "auto") == fits
    assert not rows_go_to_device(data, SAE, config, CPU, "auto"), "files are mapped"
    assert not rows_go_to_device(data, SAE, config, CUDA, "host")
    if fits:
        assert rows_go_to_device(data, SAE, config, CUDA, "device")
        return
    with pytest.raises(
        ValueError, match=r"data_on: device, but the rows take \d+\.\d kB there and training \d+\.\d kB, and"
    ):
        rows_go_to_device(data, SAE, config, CUDA, "device")


def test_auto_leaves_room_for_dead_latents(x_ND, monkeypatch):
    """And `device`, which refuses, asks for none: whether latents die is not known."""
    data, config = Activations.from_tensor(x_ND), TrainConfig(batch_size=128, steps=10, dead_after=1280)
    surely, most = (f(SAE, config, 1500, *more) for f, more in ((memory_of, ()), (most_memory_of, (CUDA,))))
    rows, of_dead = 1500 * 16 * 4, auxiliary_memory(SAE, config, 1500, CUDA)
    assert most - surely == of_dead > 6 * 4 * SAE.d_in * SAE.d_sae
    for missing, fits in ((0, True), (1, False)):
        monkeypatch.setattr(memory, "free_memory", lambda device, missing=missing: rows + most - missing)
        assert rows_go_to_device(data, SAE, config, CUDA, "auto") == fits
    monkeypatch.setattr(memory, "free_memory", lambda device: rows + surely)
    assert rows_go_to_device(data, SAE, config, CUDA, "device")


@pytest.mark.parametrize(
    ("architecture", "more"),
    [("topk", {"dead_after": 1281}), ("topk", {"auxk_alpha": 0}), ("topk", {"control": "untrained"}), ("relu", {})],
)
def test_where_no_latent_can_be_dead_the_loss_takes_nothing(architecture, more):
    k = {} if architecture == "relu" else {"k": 4}
    sae = SAEConfig.sized(16, expansion=4, architecture=architecture, **k)
    config = TrainConfig(**({"batch_size": 128, "steps": 10, "dead_after": 10} | more))
    assert auxiliary_memory(sae, config, 1500, CUDA) == 0


# rows, d_in, dead latents: of which weights, blocks or rows take most; and as rows are one block or several
SHAPES = [(8, 256, 512), (600, 16, 500), (500, 600, 16), (300, 200, 400)]


@pytest.mark.parametrize("blocks", [1, 7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["one process", "a rank", "a rank's GPU"])
def test_what_the_auxiliary_loss_holds_is_what_is_counted(monkeypatch, way, shape, blocks):
    """By a counting allocator; at most twice what is made, where the limit of a block is that of a test."""
    n_rows, d_in, n_dead = shape
    block = -(-n_rows // blocks) * n_dead
    monkeypatch.setattr(dead_latents, "_AUX_ELEMENTS", block)
    monkeypatch.setattr(sharded_dead, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(sharded_dead, "_GPU_ELEMENTS", block)
    monkeypatch.setattr(sharded_dead, "on_gpu", lambda _: way == "a rank's GPU")
    held = held_by_loss(way, *shape)
    sae = SAEConfig.sized(d_in, d_sae=n_dead, k=3, architecture="topk")
    config = TrainConfig(steps=10, batch_size=n_rows, dead_after=1)
    counted = auxiliary_memory(sae, config, n_rows, CPU) - 16 * (n_rows * n_dead - block)
    assert held <= counted < 2.5 * held, counted / held


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels that do nothing: tensors of the CPU")
@pytest.mark.parametrize("shape", [(4096, 128, 512), (512, 512, 256), (2048, 64, 2048), (4096, 64, 200)])
def test_what_a_gpus_auxiliary_loss_holds_is_counted(monkeypatch, shape):
    """Of the tensors that kernels are given on an H200, where few dead latents have many parts of sums."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from saevlm_fast.kernels import auxiliary_triton

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(auxiliary_triton, "product_config", lambda _: auxiliary_triton.tile_config((9, 0)))
    monkeypatch.setattr(auxiliary_triton, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(dead_latents, "on_gpu", lambda _: True)
    n_rows, d_in, n_dead = shape
    held = held_by_loss("one process", *shape)
    sae = SAEConfig.sized(d_in, d_sae=n_dead, k=3, architecture="topk")
    counted = auxiliary_memory(sae, TrainConfig(steps=10, batch_size=n_rows, dead_after=1), n_rows, CUDA)
    assert held <= counted < 4 * held, counted / held
    limits = dead_latents._AUX_ELEMENTS, auxiliary_triton.MOST_ELEMENTS, sharded_dead._GPU_ELEMENTS
    assert limits == (1 << 23, 1 << 26, 1 << 27)  # as auxiliary_memory has them


def held_by_loss(way, n_rows, d_in, n_dead):
    sae = SparseAutoencoder(SAEConfig.sized(d_in, d_sae=n_dead, k=3, architecture="topk"))
    sae.reset_parameters(0)
    x, x_hat = torch.randn(2, n_rows, d_in, generator=torch.Generator().manual_seed(0))
    dead = DeadLatents(torch.arange(n_dead), n_dead)
    with torch.no_grad(), HeldMemory(x, *sae.parameters(), dead.latents_A) as held:
        if way == "one process":
            auxiliary(sae, x, x_hat, dead, 0.5)
        else:
            sharded_dead.shared_auxiliary(sae, Ranks.of(Alone()), x, x_hat, dead, 0.5, n_rows, None, 0)
    return held.peak


def test_a_system_that_does_not_say_is_taken_at_its_word(x_ND, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert rows_go_to_device(Activations.from_tensor(x_ND), SAE, TrainConfig(), CPU, "device")


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_run_is_the_same_wherever_its_rows_are(x_ND, tmp_path, architecture, dtype):
    np.save(tmp_path / "x.npy", x_ND.to(dtype).numpy())
    config = SAEConfig.sized(16, expansion=4, k=4, architecture=architecture)
    recipe = TrainConfig(steps=40, batch_size=128, lr=3e-3)
    runs = [
        train(open_activations(tmp_path / "x.npy"), config, recipe, RunOptions(device="cpu", data_on=data_on))
        for data_on in ("host", "device")
    ]
    for name, tensor in runs[0][0].state_dict().items():
        assert torch.equal(tensor, runs[1][0].state_dict()[name]), name
    assert runs[0][1] == runs[1][1]


def test_a_run_may_be_resumed_with_its_rows_elsewhere(x_ND, tmp_path):
    class Stop(Exception):
        pass

    def stop(step):
        if step == 23:
            raise Stop

    recipe, data = TrainConfig(steps=40, batch_size=128, lr=3e-3), Activations.from_tensor(x_ND)
    whole, _ = train(data, SAE, recipe, device="cpu")
    kept = {"output": tmp_path / "run", "device": "cpu", "checkpoint_every": 10}
    with pytest.raises(Stop):
        train(data, SAE, recipe, RunOptions(**kept, data_on="device"), on_step=stop)
    resumed, _ = train(data, SAE, recipe, RunOptions(**kept, data_on="host", resume=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_rows_that_are_not_finite_are_named_before_training(x_ND):
    x_ND = x_ND.clone()
    x_ND[1234, 5] = torch.nan
    held = Activations.from_tensor(x_ND[:100])
    with pytest.raises(ValueError, match=r"tensor \[1500, 16\]: row 1234, column 5 is nan"):
        train(
            Activations.from_tensor(x_ND), SAE, steps=1, batch_size=8, data_on="device", device="cpu", validation=held
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_widened_before_they_are_divided(x_ND, device, dtype):
    state = TrainingState(Activations.from_tensor(x_ND), SAE, TrainConfig(), device)
    state.scale = Scale(3.7)
    x_BD, divisor = x_ND[:64].to(device, dtype), torch.tensor(3.7, device=device)
    out = torch.empty(64, 16, device=device)
    assert state.normalised(x_BD, out=out) is out
    assert torch.equal(out, x_BD.float() / divisor)
    assert torch.equal(state.normalised(x_BD), out)


def on_disk(path):
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_room_is_asked_for_all_checkpoints_that_are_there_at_once(x_ND, monkeypatch, tmp_path, many, n):
    """The most that was there when a checkpoint or an SAE had just been written, before others went, and no less."""
    saes = {"a": SAE, "b": SAE} if many else {"": SAE}
    known = {"steps": n, "checkpoint_every": 1, "batch_size": 64, "device": "cpu", "output": tmp_path / "run"}
    run = partial(train_many, x_ND, saes) if many else partial(train, x_ND, SAE)
    most = []
    for name in ("_drop_old", "finish"):
        before = getattr(RunDirectory, name)

        def measured(self, *given, before=before):
            most.append(on_disk(tmp_path / "run"))
            before(self, *given)

        monkeypatch.setattr(RunDirectory, name, measured)
    run(**known)
    needed = memory.training_disk(*saes.values(), written=Written.IN_TURN, n_checkpoints=min(n, 3))
    assert needed <= max(most) <= needed + len(saes) * 8000, "headers, thresholds and counters apart"
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, needed - 1))
    kept = "a checkpoint" if n == 1 else f"{min(n, 3)} checkpoints"
    told = rf"^output: 2 SAEs with {kept} each take" if many else rf"^output: the SAE with {kept} takes"
    with pytest.raises(ValueError, match=rf"{told} {size_text(needed)}, and .* are free on the disk of .*run"):
        run(**known)
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, needed))
    with warnings.catch_warnings(action="error"):
        run(**known)


def test_a_run_by_the_clock_may_keep_more_than_there_is_room_for(x_ND, monkeypatch, tmp_path):
    one, three = (memory.training_disk(SAE, written=Written.IN_TURN, n_checkpoints=n) for n in (1, 3))
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, one))
    told = rf"^output: the SAE with 3 checkpoints takes {size_text(three)}, as a run of minutes .*, and .* are free on"
    with pytest.warns(Doubt, match=told):
        train(x_ND, SAE, steps=3, batch_size=64, device="cpu", output=tmp_path / "run")


def test_a_group_is_told_once_of_what_may_not_fit(x_ND, monkeypatch, tmp_path):
    saes = {"a": SAE, "b": SAE}
    one = memory.training_disk(*saes.values(), written=Written.IN_TURN, n_checkpoints=1)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, one))
    monkeypatch.setattr(memory, "_with_checkpoints", lambda *given: ("what", 3 * one) if given[1] > 1 else ("", 0))
    with pytest.warns(Doubt, match="^output: what") as told:
        train_many(x_ND, saes, steps=3, batch_size=64, device="cpu", output=tmp_path / "run")
    assert len(told) == 1


def test_how_checkpoints_are_written_says_what_room_they_take():
    """Of two SAEs: three copies or four, and one or both at once beside the two that each keeps."""
    one = 4 * memory.sae_numbers(SAE)
    taken = {how: memory.training_disk(SAE, SAE, written=how) / one for how in Written}
    assert taken == {Written.IN_TURN: 20, Written.BESIDE_STEPS: 24, Written.BY_RANKS: 15}
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [Written.by(gpu), Written.by(cpu)] == [Written.BESIDE_STEPS, Written.IN_TURN]
    assert Written.by(gpu, 2) is Written.by(cpu, 2) is Written.BY_RANKS


@pytest.mark.parametrize("many", [False, True])
def test_a_run_whose_checkpoint_cannot_be_kept_is_refused_before_its_first_step(x_ND, monkeypatch, tmp_path, many):
    """What is asked for is what a run of one checkpoint takes."""
    saes = {"a": SAE, "b": SAE} if many else {"": SAE}
    known = {"steps": 3, "batch_size": 64, "device": "cpu", "output": tmp_path / "run"}
    run = partial(train_many, x_ND, saes) if many else partial(train, x_ND, SAE)
    run(**known)
    taken = on_disk(tmp_path / "run")
    needed = memory.training_disk(*saes.values(), written=Written.IN_TURN, n_checkpoints=1)
    assert needed <= taken <= needed + len(saes) * 3000, "headers, thresholds and counters apart"
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, needed - 1))
        patch.setattr(Stepper, "step", lambda *_: pytest.fail("a step was taken"))
        with pytest.raises(
            ValueError, match=rf"^output: .* {needed / 1e3:.1f} kB, and .* are free on the disk of .*run"
        ):
            run(**known)
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (0, 0, 0))  # a file system that knows no size
    run(**known)
