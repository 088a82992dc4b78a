"""A whole training step (encode, losses, gradients, projection, clip, Adam, unit rows) beside dense autograd.

The dense step is tests/helpers/dense_trainer.py: the same recipe by [B, d_sae] matrices, autograd, torch.optim.Adam.
"""

from itertools import cycle

import pytest

from dense_trainer import DenseTrainer
from saevlm_fast.config import SAEConfig, TrainConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.capture import CapturedSteps
from saevlm_fast.training.step import Stepper

GOAL = {"clip-l14-x16": 4.0}  # times the dense step's speed on CPU, B = 1024


def make_steps(architecture, case, batches, device):
    """(our Stepper, a dense trainer with the same weights), their calls each going round the batches."""
    config = TrainConfig(warmup_steps=0, threshold_start=0)
    sae = SparseAutoencoder(SAEConfig.sized(case.d_in, d_sae=case.d_sae, k=case.k, architecture=architecture), device)
    sae.b_dec.data.copy_(batches[0].mean(0))
    with device:
        dense = DenseTrainer(
            sae.W_dec.detach().clone(),
            sae.b_dec.detach().clone(),
            architecture=architecture,
            k=case.k,
            group_ends=sae.config.group_ends,
            config=config,
            d_sae=case.d_sae,
        )
    return Stepper(sae, config), dense


def check_steps(stepper, dense, fast_step, dense_step):
    """The same losses over two steps, and the same change of the weights, but for near ties.

    And but for gradients near zero, of which Adam's first steps take little more than the sign (4 % on an H200).
    """
    before = stepper.sae.W_dec.detach().clone()
    for _ in range(2):
        loss, expected = float(fast_step().losses.overall), dense_step()
        assert loss == pytest.approx(expected, rel=1e-4)
    change, expected = stepper.sae.W_dec.detach() - before, dense.W_dec.detach() - before
    assert (change - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("impl", ["dense", "saevlm_fast"])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_step(measure, encoder_gemm, goal, request, case, batches, device, architecture, impl):
    if device.type == "cpu" and case.d_sae > 2**15 and architecture != "batch_topk":
        pytest.skip("ten seconds a dense step on a CPU: batch_topk stands for all three at this size")
    stepper, dense = make_steps(architecture, case, batches, device)
    steps = CapturedSteps(stepper)  # as `train` takes them
    fast_batches, dense_batches = cycle(batches), cycle(batches)

    def fast_step():
        return steps.step(next(fast_batches))

    def dense_step():
        return dense.step(next(dense_batches))

    rows = {"rows/s": case.n_rows}
    ratios = measure(
        f"{architecture} training step",
        impl,
        {"saevlm_fast": (fast_step, rows), "dense": (dense_step, rows)},
        check=lambda: check_steps(stepper, dense, fast_step, dense_step),
        shape=case.shape,
        dtype="float32",
        floor=encoder_gemm(batches[0], stepper.sae.W_enc.detach()),
    )
    name = request.node.callspec.params["case"]
    if device.type == "cpu" and name in GOAL and "dense" in ratios:
        goal(f"{architecture} step at {name} over dense autograd", ratios["dense"], GOAL[name])
