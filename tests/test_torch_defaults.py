"""What people set for the whole of torch, as for a language model they load, changes no result: the default dtype and
device, autocast, the precision of float32 products, deterministic algorithms."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import saevlm_fast as sf
from saevlm_fast.images.decode import decode
from saevlm_fast.kernels.common import Op
from saevlm_fast.training.step import Stepper

ROOT = Path(__file__).resolve().parents[1]
SAE = sf.SAEConfig.sized(16, expansion=2, k=3)
ARCHITECTURES = "topk", "batch_topk", "matryoshka", "relu", "jumprelu"


@contextmanager
def defaults(dtype=None, device=None, autocast=None, matmul="highest", deterministic=False):
    before, was = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    torch.set_default_dtype(dtype or before)
    torch.set_default_device(device)
    torch.set_float32_matmul_precision(matmul)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(was)


def rows(n=150, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def trained():
    sae, metrics = sf.train(rows(), SAE, steps=5, batch_size=64, device="cpu")
    return sae.state_dict(), metrics


def harvested():
    stored = sf.harvest("hf:tiny-clip", "scenes:test:8", layer=3)
    return [x_BD for _, x_BD in stored.chunks(5)], stored.rows(torch.arange(3, device="cpu")), stored.dtype


def encoded(tmp_path):
    sae = sf.SparseAutoencoder(sf.SAEConfig.sized(16, expansion=2, k=3, architecture="topk"))
    sae.save_pretrained(tmp_path / "sae")
    sae = sf.SparseAutoencoder.from_pretrained(tmp_path / "sae")
    codes = sae.encode(rows(5))
    return codes.top_acts, codes.top_indices, sae.decode(codes), codes.join([], 3).top_acts


def stored(tmp_path):
    with sf.ActivationWriter(tmp_path / "store", 16, torch.float16, {"model": "x"}) as writer:
        writer.append(rows(7), {"image": [str(i) for i in range(7)], "token": [0] * 7})
    opened = sf.open_activations(tmp_path / "store")
    return opened.rows(torch.tensor([3, 1], device="cpu")), [x_BD for _, x_BD in opened.chunks(4)]


def trusted():
    scores = sf.trusted_score(rows(), rows(d=8, seed=1))
    return scores.ms, scores.p, scores.above_null, [list(column) for column in scores.table().to_pydict().values()]


def answered():
    """With torch's own defaults as far as the model's library goes: people's models run where they were loaded."""
    asked = answerer()
    question = asked.ask(scene(), "What colour is the object?")
    return asked.answers([sf.SteeredRow(question, None), sf.SteeredRow(question, (sf.clamp(3, 50.0),))])


def answerer():
    sae = sf.SparseAutoencoder(sf.SAEConfig.sized(128, expansion=2, k=4, architecture="topk"))
    return sf.SteeredAnswers(*sf.load_llava("hf:tiny-llava"), sae, layer=3, max_new_tokens=2)


def scene():
    return decode(sf.open_images("scenes:test:1").read(0))


def joined():
    """Of half-precision SAEs, whose tensors an autocast to the other half refuses to put together."""
    pieces = []
    for dtype in (torch.bfloat16, torch.float16):
        sae = sf.SparseAutoencoder(sized("batch_topk"), dtype=dtype)
        codes = sae.encode(rows(20, 96).to(dtype), use_threshold=False)
        codes.check("codes")
        pieces.append(sf.SparseCodes.join([codes, codes], codes.d_sae).top_acts)
    return pieces


def sized(architecture):
    return sf.SAEConfig.sized(96, expansion=4, architecture=architecture, **sparsity(architecture))


def sparsity(architecture):
    return {} if architecture in ("relu", "jumprelu") else {"k": 8}


def gradients(architecture):
    """Of an SAE within somebody's model, whose backward pass is run in the same context; wide enough that oneDNN would
    multiply in the precision that is set."""
    sae = sf.SparseAutoencoder(sized(architecture)).train()
    x_BD = rows(200, 96).requires_grad_()
    x_hat_BD = sae(x_BD)
    x_hat_BD.square().sum().backward()
    pre_BS = sae.pre_activations(x_BD).detach()
    return x_hat_BD.detach(), pre_BS, x_BD.grad, {name: weights.grad for name, weights in sae.named_parameters()}


def stepped(architecture):
    stepper = Stepper(sf.SparseAutoencoder(sized(architecture)), sf.TrainConfig())
    return [list(stepper.step(rows(200, 96, seed))) for seed in range(3)], stepper.sae.state_dict()


def trained_as(architecture):
    sae, metrics = sf.train(rows(500, 96), sized(architecture), steps=4, batch_size=128, device="cpu")
    return sae.state_dict(), metrics


CALLS: dict[str, Callable[[Any], Any]] = {
    "score": lambda _: sf.score(rows(), rows(d=8, seed=1)).ms,
    "trusted_score": lambda _: trusted(),
    "train": lambda _: trained(),
    "train_many": lambda _: {
        n: t.sae.state_dict() for n, t in sf.train_many(rows(), {"a": SAE}, steps=3, device="cpu").items()
    },
    "evaluate": lambda _: sf.evaluate(trained_sae(), rows()),
    "measure": lambda _: figures(sf.measure(trained_sae(), rows())),
    "harvest": lambda _: harvested(),
    "encode": encoded,
    "store": stored,
    "top_images": lambda _: sf.top_images(rows(), list(range(4)), n=3),
    "join": lambda _: joined(),
    "mean residual": lambda _: answerer().mean_residual(scene(), "What colour is the object?"),
    "texts": lambda _: sf.load_text_encoder("hf:tiny-clip").embed(["a red circle", "a blue square"]),
    "answers": lambda _: answered(),
    **{f"gradients of {each}": lambda _, each=each: gradients(each) for each in ARCHITECTURES},
    **{f"training of {each}": lambda _, each=each: trained_as(each) for each in ARCHITECTURES},
    "steps": lambda _: stepped("batch_topk"),
}
GIVEN = [
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64},
    {"device": "meta"},
    {"autocast": torch.bfloat16},
    {"autocast": torch.float16},
    {"matmul": "medium"},
    {"deterministic": True},
]


def trained_sae():
    return sf.train(rows(), SAE, steps=2, batch_size=64, device="cpu")[0]


def figures(evaluation):
    return {name: value for name, value in evaluation.results[0].figures.items() if isinstance(value, float)}


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
        assert not found.is_inference()
        assert not expected.is_inference()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, two in zip(found, expected):
            same(one, two)
    else:
        assert found == expected or found != found


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_a_setting_of_torch_changes_nothing(name, given, tmp_path):
    expected = CALLS[name](tmp_path / "before")
    with defaults(**given):
        found = CALLS[name](tmp_path / "after")
        assert torch.get_default_dtype() == given.get("dtype", torch.float32)
        assert torch.get_default_device().type == given.get("device", "cpu")
        assert torch.is_autocast_enabled("cpu") == ("autocast" in given)
        assert torch.get_float32_matmul_precision() == given.get("matmul", "highest")
    same(found, expected)


REFUSED = {"kthvalue", "median", "histc", "put_"}  # on a GPU, where algorithms must be deterministic


def refused_calls(tree: ast.Module) -> Iterator[int]:
    """Lines of torch's operations that are refused, bincount with weights among them."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of_numpy = isinstance(node.func.value, ast.Name) and node.func.value.id == "np"
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        places = node.args[of_torch:] + [k for k in node.keywords if k.arg == "weights"]  # behind what is counted
        weighted = node.func.attr == "bincount" and len(places) > 0
        if not of_numpy and (node.func.attr in REFUSED or weighted):
            yield node.lineno


@pytest.mark.parametrize("room", ["kernels", "saevlm_fast"])
def test_no_operation_that_deterministic_algorithms_refuse(room):
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for line in refused_calls(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.gpu
def test_deterministic_algorithms_on_a_gpu():
    """In a process of its own: cuBLAS reads its setting when it starts."""
    code = """
import torch, saevlm_fast as sf
torch.use_deterministic_algorithms(True)
x, e = torch.randn(300, 16).cuda(), torch.randn(300, 8).cuda()
for architecture, k in ("topk", 3), ("batch_topk", 3), ("matryoshka", 3), ("relu", None), ("jumprelu", None):
    config = sf.SAEConfig.sized(16, expansion=2, architecture=architecture, **({"k": k} if k else {}))
    sae, _ = sf.train(x, config, steps=20, batch_size=64, device="cuda")
    sf.evaluate(sae, x), sf.measure(sae, x)
    for own in (sae, None):
        sf.trusted_score(x, e, own, device="cuda")
        for similarity in ("cosine", "dot", "rbf"):
            sf.score(x, e, own, similarity=similarity, device="cuda")
    sf.top_images(x, [0], 3, sae)
"""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}
FUNCTIONS = ("score", "train", "train_many", "evaluate", "measure", "top_images", "mean residual", "texts", "answers")


@pytest.mark.parametrize("name", [*FUNCTIONS, *(f"training of {each}" for each in ARCHITECTURES)])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_gradients_changes_nothing(name, mode, tmp_path):
    expected = CALLS[name](tmp_path / "before")
    with MODES[mode]():
        found = CALLS[name](tmp_path / "after")
    same(found, expected)


def test_an_sae_that_was_opened_in_inference_mode_can_be_trained(tmp_path):
    with torch.inference_mode():
        sf.SparseAutoencoder(sized("topk")).save_pretrained(tmp_path)
        sae = sf.SparseAutoencoder.from_pretrained(tmp_path)
        made = sf.SparseAutoencoder(sized("topk"))
        made.reset_parameters(1)
    for each in (sae, made):
        assert list(Stepper(each.train(), sf.TrainConfig()).step(rows(200, 96)))
        each(rows(20, 96)).square().sum().backward()
        assert each.W_enc.grad is not None


MEASURED: dict[str, Callable[[sf.SparseAutoencoder], Any]] = {
    "score": lambda sae: sf.score(rows(), rows(d=8, seed=1), sae),
    "trusted_score": lambda sae: sf.trusted_score(rows(), rows(d=8, seed=1), sae),
    "trusted_scores": lambda sae: sf.trusted_scores(rows(), {"a": rows(d=8, seed=1)}, sae),
    "evaluate": lambda sae: sf.evaluate(sae, rows()),
    "measure": lambda sae: sf.measure(sae, rows()),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_measured_on_a_gpu_is_measured_exactly(name, monkeypatch):
    """Its matrix products too, which are torch's: somebody has allowed TF32."""
    seen, call = set(), Op.__call__

    def look(self, *args, **kwargs):
        seen.add(torch.backends.cuda.matmul.fp32_precision)
        return call(self, *args, **kwargs)

    monkeypatch.setattr("saevlm_fast.runtime._has_gpu", lambda: True)
    monkeypatch.setattr(Op, "__call__", look)
    before, sae = torch.backends.cuda.matmul.fp32_precision, trained_sae()
    seen.clear()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        MEASURED[name](sae)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen == {"ieee"}
