"""What kernels/common.py makes of a function: an op of torch's, which does not start Dynamo and is not traced by it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from saevlm_fast.config import SAEConfig
from saevlm_fast.kernels.common import custom_op
from saevlm_fast.kernels.topk_encode import topk_encode, topk_encode_op
from saevlm_fast.sae import SparseAutoencoder

ROOT = Path(__file__).resolve().parents[2]
traced: list[bool] = []


@custom_op("doubled_for_a_test")
def doubled(x: Tensor) -> Tensor:
    raise AssertionError("a CUDA kernel, on no GPU")


@doubled.register_kernel("cpu")
def doubled_cpu(x: Tensor) -> Tensor:
    traced.append(torch.compiler.is_dynamo_compiling())
    return x * 2


@doubled.register_fake
def doubled_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("count_up_for_a_test", mutates_args=("x",))
def count_up(x: Tensor) -> None:
    x += 1


@count_up.register_kernel("cpu")
def count_up_cpu(x: Tensor) -> None:
    x += 1


def test_the_first_call_of_an_op_imports_neither_dynamo_nor_triton():
    code = """
import sys, torch
from saevlm_fast.kernels.sparse_decode import sparse_decode
from saevlm_fast.kernels.topk_encode import topk_encode, topk_encode_op
x, W, b, zeros = torch.randn(5, 7), torch.randn(7, 70), torch.zeros(70), torch.zeros(7)
W_dec = W.T.contiguous().requires_grad_()
sparse_decode(*topk_encode(x, W, b, zeros, 3), None, W_dec, zeros).sum().backward()
assert W_dec.grad.any()
assert not {"torch._dynamo", "triton"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_kernel_between_two_graphs_is_not_traced():
    def with_a_break(x: Tensor) -> Tensor:
        try:  # Dynamo leaves such a function alone, and looks into those that it calls
            torch._dynamo.graph_break()
            return torch.ops.saevlm_fast.doubled_for_a_test(x)
        finally:
            len("")

    traced.clear()
    assert torch.equal(torch.compile(with_a_break, backend="eager")(torch.ones(3)), torch.full((3,), 2.0))
    assert traced == [False]
    doubled_cpu(torch.ones(3))
    torch.compile(doubled_cpu, backend="eager")(torch.ones(3))
    assert traced[-1], "a traced kernel would be noticed"


def test_an_op_is_traced_as_one():
    torch.library.opcheck(doubled.overload, (torch.ones(3),))
    compiled = torch.compile(lambda x: doubled(x + 1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 4.0))


def test_a_gradient_without_a_formula_is_refused():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="doubled_for_a_test"):
        doubled(x).sum().backward()


def forwards(how: str, function: Callable[[Tensor], Tensor], x: Tensor) -> object:
    if how == "jacfwd":
        return torch.func.jacfwd(function)(x)
    if how == "linearize":
        return torch.func.linearize(function, x)
    if how == "dual":
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(x, x))
    tangent = lambda x: torch.func.jvp(function, (x,), (x,))[1]  # noqa: E731
    return (tangent if how == "jvp" else torch.compile(tangent, backend=how))(x)


@pytest.mark.parametrize("how", ["jvp", "jacfwd", "linearize", "dual", "eager", "aot_eager"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_derivative_forwards_is_refused(how, grad):
    """torch would call it 0."""
    sae = SparseAutoencoder(SAEConfig(5, 12, 2, "topk"))
    codes = sae.encode(torch.ones(1, 5))
    for function, x in (
        (sae, torch.ones(1, 5)),
        (lambda acts: sae.decode(codes._replace(top_acts=acts)), codes.top_acts.detach()),
    ):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(NotImplementedError, match="has no forward-mode derivative"),
        ):
            forwards(how, function, x)
    with forward_ad.dual_level():  # of something else
        torch.testing.assert_close(doubled(torch.ones(3)), torch.full((3,), 2.0))


BACKWARDS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "vjp": lambda function, x: torch.func.vjp(function, x),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
}


def tangents(function: Callable[[Tensor], Tensor], x: Tensor) -> object:
    return torch.func.jvp(function, (x,), (x,))[1]


HIDDEN: dict[str, Callable[[SparseAutoencoder, Tensor], object]] = {
    "outer": lambda sae, x: tangents(lambda z: tangents(lambda y: sae(z) * y, x), x),
    "mapped": lambda sae, x: tangents(torch.func.vmap(sae), x),
    "exported": lambda sae, x: tangents(torch.export.export(sae, (x,)).module(), x),
    "traced": lambda sae, x: tangents(make_fx(sae)(x), x),
    "the overload": lambda sae, x: tangents(lambda x: topk_encode_op.overload(x, *weights(sae), 2, None)[0], x),
}


def weights(sae: SparseAutoencoder) -> tuple[Tensor, ...]:
    return sae.W_enc, sae.b_enc, sae.b_dec


@pytest.mark.parametrize("how", HIDDEN)
def test_a_derivative_forwards_is_refused_where_python_does_not_see_it(how):
    sae = SparseAutoencoder(SAEConfig(5, 12, 2, "topk")).requires_grad_(False)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        HIDDEN[how](sae, torch.ones(1, 5))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_derivative_forwards_is_refused_by_what_was_compiled_without(backend):
    compiled, x = torch.compile(SparseAutoencoder(SAEConfig(5, 12, 2, "topk")), backend=backend), torch.ones(1, 5)
    with torch.no_grad(), forward_ad.dual_level():
        compiled(x)
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            compiled(forward_ad.make_dual(x, x))


def test_what_has_no_tangent_passes_beside_one():
    sae, x = SparseAutoencoder(SAEConfig(5, 12, 2, "topk")).requires_grad_(False), torch.ones(1, 5)
    for function in (sae, torch.func.vmap(sae)):
        torch.testing.assert_close(tangents(lambda y, function=function: y * function(x), x), sae(x) * x)


@pytest.mark.parametrize("how", BACKWARDS)
def test_a_derivative_by_torch_func_is_refused(how):
    sae, x = SparseAutoencoder(SAEConfig(5, 12, 2, "topk")), torch.ones(1, 5)
    with pytest.raises(NotImplementedError, match=r"has no derivative by torch\.func"):
        BACKWARDS[how](sae, x)
    with pytest.raises(NotImplementedError, match=r"has no derivative by torch\.func"):  # of the weights, within
        torch.func.grad(lambda y: (y * sae(x)).sum())(x)
    sae.requires_grad_(False)
    torch.testing.assert_close(torch.func.grad(lambda y: (y * sae(x)).sum())(x), sae(x))
    jacobian = torch.autograd.functional.jacobian(sae, x)
    acts, latents = sae.encode(x)[:2]
    expected = sum(torch.outer(sae.W_dec[i], sae.W_enc[:, i]) for i, a in zip(latents[0], acts[0]) if a > 0)
    torch.testing.assert_close(jacobian[0, :, 0], expected.detach())


def test_what_an_op_writes_autograd_knows():
    x = torch.ones(3, requires_grad=True)
    counter = torch.ones(3)
    product = (x * counter).sum()  # its gradient needs the counter as it is now
    count_up(counter)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_device_without_a_kernel_is_named():
    with pytest.raises(NotImplementedError, match="doubled_for_a_test"):
        doubled.overload(torch.ones(3).to_mkldnn())


def test_an_op_that_is_defined_anew_has_its_new_kernels():
    """As by importlib.reload or a notebook's %autoreload."""
    for factor in (2, 3):

        @custom_op("defined_twice_for_a_test")
        def op(x: Tensor) -> Tensor:
            raise AssertionError("a CUDA kernel, on no GPU")

        op.register_kernel("cpu")(lambda x, factor=factor: x * factor)
        op.register_fake(lambda x: x.new_empty(x.shape))
        assert torch.equal(op(torch.ones(2)), torch.full((2,), float(factor)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_op_knows_no_autocast(dtype):
    """Nor does its gradient, by whatever operations it is computed."""
    x_BD, W_DS, zeros_S, zeros_D = torch.randn(20, 32), torch.randn(32, 128), torch.zeros(128), torch.zeros(32)

    def gradients(autocast):
        weights = W_DS.clone().requires_grad_(), zeros_D.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            assert (x_BD @ W_DS).dtype == (dtype if autocast else torch.float32)
            acts_BK, _ = topk_encode(x_BD, weights[0], zeros_S, weights[1], 4)
            acts_BK.square().sum().backward()
        return acts_BK.detach(), *(each.grad for each in weights)

    for found, expected in zip(gradients(True), gradients(False)):
        assert torch.equal(found, expected)
        assert found.any()


def test_an_op_knows_no_rough_products():
    """torch.set_float32_matmul_precision("medium") makes bfloat16 of float32 where a CPU has units for it."""
    seen = []

    @custom_op("precision_for_a_test")
    def op(x: Tensor) -> Tensor:
        raise AssertionError("a CUDA kernel, on no GPU")

    def look(x):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return x * 2

    op.register_kernel("cpu")(look)
    op.register_fake(lambda x: x.new_empty(x.shape))
    op.register_autograd(lambda context, gradient: look(gradient), setup_context=lambda ctx, inputs, output: None)
    torch.set_float32_matmul_precision("medium")
    try:
        op(torch.ones(2, requires_grad=True)).sum().backward()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee", "ieee"]
