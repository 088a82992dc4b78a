"""Hooks leave a model as it was, several points are read in one pass, and what is compiled agrees."""

import functools

import pytest
import torch
from narrow_towers import ALL_POINTS, WIDTH, noise, run_all

from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint


@pytest.fixture(scope="module")
def tower(saved):
    return load_tower(f"hf:{saved('clip')[0]}")


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_forward_stops_after_the_last_point(tower):
    inputs, called = tower.preprocess(noise()), []
    with tower.hooked([HookPoint("residual", 1), HookPoint("mlp", 0)]) as run:
        handles = [
            block.register_forward_pre_hook(lambda *args, n=n: called.append(n))
            for n, block in enumerate(tower.anatomy.blocks)
        ]
        handles.append(tower.anatomy.blocks[1].mlp.register_forward_hook(lambda *args: called.append("mlp 1")))
        acts = run(inputs)
        assert called == [0, 1, "mlp 1"]
        assert set(acts) == {HookPoint("residual", 1), HookPoint("mlp", 0)}
    with tower.hooked([HookPoint("attention", 1)]) as run:
        called.clear()
        run(inputs)
        assert called == [0, 1]
    for handle in handles:
        handle.remove()


def test_the_model_is_left_as_it_was(tower):
    inputs = tower.preprocess(noise())
    with torch.inference_mode():
        before = tower.forward(inputs).image_embeds
    attributes = [set(vars(module)) for module in tower.model.modules()]
    with pytest.raises(ZeroDivisionError), tower.hooked(ALL_POINTS) as run:
        print(len(run(inputs)) / 0)
    with pytest.raises(Exception, match="Input image size"), tower.hooked(ALL_POINTS) as run:
        run({"pixel_values": torch.zeros(1, 3, 5, 5, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="layer"), tower.hooked([HookPoint("mlp", 0), HookPoint("mlp", 9)]):
        pass
    assert hooks(tower.model) == 0
    assert [set(vars(module)) for module in tower.model.modules()] == attributes
    assert not tower.model.training
    assert not any(parameter.requires_grad for parameter in tower.model.parameters())
    with torch.inference_mode():
        assert torch.equal(tower.forward(inputs).image_embeds, before)


def test_batches_leave_nothing_for_each_other(tower):
    points = [HookPoint("residual", 0), HookPoint("residual", 2)]
    with tower.hooked(points) as run:
        first = run(tower.preprocess(noise()))
        kept = {point: acts.clone() for point, acts in first.items()}
        run(tower.preprocess(noise(2)))
        handle = tower.anatomy.blocks[1].register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tower.preprocess(noise(2)))
        handle.remove()
        assert all(torch.equal(first[point], kept[point]) for point in points)
        again = run(tower.preprocess(noise()))
        assert all(torch.equal(again[point], kept[point]) for point in points)


def test_several_points_in_one_pass_equal_single_ones(tower):
    points = [*ALL_POINTS, HookPoint("pooled"), HookPoint("projection")]
    together = run_all(tower, noise(), points)
    with tower.hooked(points) as run:
        assert run.shapes == {
            point: (17, WIDTH) if point.layer is not None else (None, {"pooled": WIDTH}.get(point.point, 12))
            for point in points
        }
    for point in points:
        assert torch.equal(run_all(tower, noise(), [point])[point], together[point])
    for point, acts in together.items():
        assert not acts.requires_grad, point


def test_autocast(tower):
    point = HookPoint("mlp", 2)
    exact = run_all(tower, noise(), [point])[point]
    half = run_all(tower, noise(), [point], autocast=torch.bfloat16)[point]
    assert half.dtype == torch.bfloat16
    assert 0 < (half - exact).abs().max() / exact.abs().max() < 0.05


def test_compiled_blocks_share_their_code_and_agree(tower, monkeypatch):
    """Without code generation, which takes a C++ compiler most of a minute; the test on a GPU has it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    points = [HookPoint("residual", 0), HookPoint("residual", 2), HookPoint("projection")]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    exact, compiled = run_all(tower, noise(), points), run_all(tower, noise(), points, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for point in points:
        torch.testing.assert_close(compiled[point], exact[point], atol=1e-4, rtol=1e-4)
    assert hooks(tower.model) == 0
    assert not any("forward" in vars(module) for module in tower.model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(saved, compile):
    """The same values as on the CPU, and no step that waits for the device."""
    points = [HookPoint("mlp", 1), HookPoint("residual", 2), HookPoint("projection")]
    on_cpu = load_tower(f"hf:{saved('clip')[0]}")
    expected = run_all(on_cpu, noise(), points)
    tower = load_tower(f"hf:{saved('clip')[0]}", "cuda")
    inputs = {name: tensor.cuda() for name, tensor in tower.preprocess(noise()).items()}
    with tower.hooked(points, compile=compile) as run:
        run(inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            acts = run(inputs)
            for tokens in ("cls", "patches", "mean", "random:2", "random:2:all"):
                run.select(acts[points[1]], Tokens.parse(tokens), ["a", "b", "c"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for point in points:
        torch.testing.assert_close(acts[point].cpu(), expected[point], atol=1e-3, rtol=1e-3)


def test_compiled_sublayers_leave_hooks_inside_a_block_eager(tower):
    """Without a compiler: what is compiled, and that it is restored."""
    points = [HookPoint("mlp", 1), HookPoint("residual", 2)]
    with tower.hooked(points, compile=True):
        block = tower.anatomy.blocks[1]
        compiled = {module for module in tower.model.modules() if "forward" in vars(module)}
        assert compiled == {tower.anatomy.blocks[0], block.self_attn, block.mlp, tower.anatomy.blocks[2]}
    assert not any("forward" in vars(module) for module in tower.model.modules())
