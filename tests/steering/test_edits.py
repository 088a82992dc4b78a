"""Edits against their definitions: tokens, modes, errors, several layers, compiled models."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from steered import (
    ALPHA,
    LAYER,
    PROMPT,
    D,
    S,
    alone,
    assigned,
    by_hand,
    identity_sae,
    logits,
    one_at_a_time,
    random_sae,
    residual,
    vision_settings,
)

from saevlm_fast.box_making.architecture import build_clip, build_llava, llava_processor
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.steering.edits import add, clamp, encode_tokens, scale, steer, steer_rows, zero
from saevlm_fast.towers.load import find_anatomy

MODES = {
    "clamp": ([clamp(5, ALPHA)], assigned(5, lambda z: ALPHA), False),
    "add": ([add(5, ALPHA)], assigned(5, lambda z: z + ALPHA), False),
    "scale": ([scale(5, 3.0)], assigned(5, lambda z: 3 * z), False),
    "zero": ([zero(5)], assigned(5, lambda z: 0.0), False),
    "several": (
        [clamp(5, ALPHA), scale(7, -2.0)],
        lambda z: assigned(7, lambda v: -2 * v)(assigned(5, lambda v: ALPHA)(z)),
        False,
    ),
    "only": ([clamp(5, ALPHA), scale(7, 1.0)], lambda z: assigned(5, lambda v: ALPHA)(alone([5, 7])(z)), True),
    "nothing": ([], torch.zeros_like, True),
    "identity": ([], lambda z: z, False),
}


@pytest.mark.parametrize("error", ["drop", "keep"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_every_mode_is_what_its_definition_says(llava, inputs, mode, error):
    edits, change, only = MODES[mode]
    sae, run = random_sae(), partial(logits, llava, inputs)
    x = residual(llava, run)
    with steer(llava, sae, LAYER, edits, only=only, error=error):
        steered = residual(llava, run)
    expected = by_hand(sae, x, change, torch.ones(x.shape[:2], dtype=torch.bool), error)
    torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-4)
    assert mode == "identity" or not torch.allclose(steered, x, atol=1e-2)


@pytest.mark.parametrize("tokens", ["all", "patches", "cls", "mask T", "mask BT"])
@torch.no_grad()
def test_tokens_that_are_not_chosen_stay_to_the_last_bit(llava, inputs, tokens):
    sae, run = random_sae(), partial(logits, llava, inputs)
    x = residual(llava, run)
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[:, {"all": slice(None), "patches": slice(1, None), "cls": slice(0, 1)}.get(tokens, slice(4, 9))] = True
    if tokens == "mask BT":
        mask[1] = False
    given = {"mask T": mask[0], "mask BT": mask}.get(tokens, tokens)
    with steer(llava, sae, LAYER, [clamp(5, ALPHA)], tokens=given):
        steered = residual(llava, run)
    expected = by_hand(sae, x, assigned(5, lambda z: ALPHA), mask, "drop")
    torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(steered[~mask], x[~mask])
    assert not torch.equal(steered[mask], x[mask])


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
@torch.no_grad()
def test_codes_are_those_of_inference_whatever_mode_the_sae_is_in(llava, inputs, architecture):
    groups = {"matryoshka": (S // 2, S // 2)}.get(architecture, ())
    sae = SparseAutoencoder(SAEConfig(D, S, 8, architecture, groups))
    sae.threshold.fill_(0.5)
    x = residual(llava, partial(logits, llava, inputs))
    with steer(llava, sae.train(), LAYER):
        steered = residual(llava, partial(logits, llava, inputs))
    torch.testing.assert_close(steered, sae.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("error", ["drop", "keep"])
def test_an_identity_sae_changes_nothing_to_the_last_bit(llava, inputs, error, dtype):
    """In half precision too: the SAE's float32 holds every number of the model's, there and back."""
    model = deepcopy(llava).to(dtype)
    before = logits(model, inputs)
    with steer(model, identity_sae(), LAYER, error=error):
        assert torch.equal(logits(model, inputs), before)
    with steer(model, identity_sae(), LAYER, [scale(3, 1.0)], error="keep"):
        assert torch.equal(logits(model, inputs), before)
    with steer(model, identity_sae(), LAYER, [clamp(3, ALPHA)], error=error):
        assert not torch.equal(logits(model, inputs), before)


def test_keep_without_edits_is_exact_for_any_sae_and_drop_is_its_reconstruction(llava, inputs):
    run = partial(logits, llava, inputs)
    before, x, sae = run(), residual(llava, partial(logits, llava, inputs)), random_sae()
    with steer(llava, sae, LAYER, error="keep"):
        assert torch.equal(run(), before)
    with steer(llava, sae, LAYER, error="drop"), torch.no_grad():
        torch.testing.assert_close(residual(llava, run), sae(x), rtol=1e-5, atol=1e-5)
        assert not torch.equal(run(), before)


def test_keep_changes_nothing_but_what_is_edited_also_with_an_sae_of_lower_precision(llava, inputs, pictures):
    sae = random_sae().bfloat16()
    before = residual(llava, partial(logits, llava, inputs))
    with steer(llava, sae, LAYER, [scale(3, 1.0)], error="keep"):
        assert torch.equal(residual(llava, partial(logits, llava, inputs)), before)
    answerer = SteeredAnswers(llava, llava_processor(), sae, LAYER, max_new_tokens=1, error="keep")
    question = answerer.ask(pictures[0], PROMPT)
    rows = [SteeredRow(question, None), SteeredRow(question, ()), SteeredRow(question, (scale(3, 1.0),))]
    untouched, identity, scaled = residual(llava, lambda: answerer.answers(rows))
    assert torch.equal(identity, untouched)
    assert torch.equal(scaled, untouched)


def test_autocast_does_not_reach_the_sae(llava, inputs):
    x_ND = residual(llava, partial(logits, llava, inputs)).flatten(0, 1)
    expected = encode_tokens(random_sae(), x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_tokens(random_sae(), x_ND)
    assert found.x_hat_ND.dtype == torch.float32
    assert torch.equal(found.x_hat_ND, expected.x_hat_ND)


def test_nothing_is_left_behind_by_an_end_or_an_error(llava, inputs):
    before, block = logits(llava, inputs), find_anatomy(llava).blocks[LAYER]
    hooks = list(block._forward_hooks)
    with steer(llava, random_sae(), LAYER, [clamp(5, ALPHA)]):
        assert not torch.equal(logits(llava, inputs), before)
    with pytest.raises(KeyError), steer(llava, random_sae(), LAYER, [clamp(5, ALPHA)]):
        raise KeyError
    wrong_mask = torch.ones(7, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match=r"^tokens: mask \[7\] for 3 rows of 37 tokens$"),
        steer(llava, random_sae(), LAYER, [clamp(5, ALPHA)], tokens=wrong_mask),
    ):
        logits(llava, inputs)
    assert list(block._forward_hooks) == hooks
    assert torch.equal(logits(llava, inputs), before)


@torch.no_grad()
def test_of_nested_steerings_the_inner_acts_first(llava, inputs):
    sae, run = random_sae(), partial(logits, llava, inputs)
    x = residual(llava, run)
    everywhere = torch.ones(x.shape[:2], dtype=torch.bool)
    with steer(llava, sae, LAYER, [scale(5, 3.0)], error="keep"):
        with steer(llava, sae, LAYER, [clamp(7, ALPHA)], error="drop"):
            both = residual(llava, run)
        outer = residual(llava, run)
    inner_first = by_hand(sae, x, assigned(7, lambda z: ALPHA), everywhere, "drop")
    expected = by_hand(sae, inner_first, assigned(5, lambda z: 3 * z), everywhere, "keep")
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        outer, by_hand(sae, x, assigned(5, lambda z: 3 * z), everywhere, "keep"), rtol=1e-5, atol=1e-4
    )


def test_steerings_of_two_layers_both_act(llava, inputs):
    with steer(llava, random_sae(), 0, [clamp(5, ALPHA)]):
        lower = logits(llava, inputs)
        with steer(llava, random_sae(), 3, [clamp(6, ALPHA)]):
            both = logits(llava, inputs)
    assert not torch.equal(lower, both)


def test_the_last_block_that_is_read_is_steered_also_after_the_model_has_run(llava, inputs):
    """The library collects hidden states by hooks of its own, which it adds when it is first asked for them."""
    fresh = build_llava(build_clip()).eval()
    with steer(fresh, random_sae(), 3, [clamp(5, ALPHA)]):
        first = logits(fresh, inputs)
    before = logits(fresh, inputs)
    with steer(fresh, random_sae(), 3, [clamp(5, ALPHA)]):
        again = logits(fresh, inputs)
    assert torch.equal(first, again)
    assert not torch.equal(again, before)


def test_rows_are_edited_each_in_its_own_way(llava, inputs):
    rows = [[clamp(5, ALPHA)], [], [scale(7, 3.0), add(9, ALPHA)]]
    one_by_one = []
    for b, edits in enumerate(rows):
        one = {name: tensor[b : b + 1] for name, tensor in inputs.items()}
        with steer(llava, random_sae(), LAYER, edits):
            one_by_one.append(logits(llava, one))
    with steer_rows(llava, random_sae(), LAYER, rows):
        together = logits(llava, inputs)
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_torch_compile_is_left_working():
    import transformers as t

    torch.manual_seed(0)
    model = t.CLIPVisionModel(t.CLIPVisionConfig(**vision_settings(num_hidden_layers=3))).eval().requires_grad_(False)
    compiled, pixels, sae = torch.compile(model, backend="eager"), torch.randn(2, 3, 28, 28), random_sae(32)
    run = lambda m: m(pixel_values=pixels).last_hidden_state  # noqa: E731
    before = run(compiled)
    with steer(compiled, sae, 1, [clamp(5, ALPHA)]):
        steered = run(compiled)
    with steer(model, sae, 1, [clamp(5, ALPHA)]):
        assert torch.equal(run(model), steered)
    assert torch.equal(run(compiled), before)
    assert not torch.allclose(steered, before, atol=1e-2)


def test_torch_compile_is_left_working_in_whatever_order_steerings_end():
    compilations = []

    def counting(graph, inputs):
        compilations.append(1)
        return graph

    import transformers as t

    model = t.CLIPVisionModel(t.CLIPVisionConfig(**vision_settings())).eval()
    first, second = (steer(model, random_sae(32), layer) for layer in (1, 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    double = torch.compile(lambda x: 2 * x, backend=counting)
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert not compilations  # the second is still there
    second.__exit__(None, None, None)
    double(torch.ones(2))
    assert compilations


@pytest.mark.parametrize("warm", [True, False])
def test_blocks_compiled_one_by_one_are_steered(llava, inputs, pictures, warm):
    """At the last block that is read: the library collects hidden states inside the wrappers of torch.compile."""
    model, edits, last_read = deepcopy(llava), [clamp(5, ALPHA)], 3
    blocks = model.model.vision_tower.encoder.layers
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend="eager")
    before = logits(model, inputs) if warm else None
    with steer(model, random_sae(), last_read, edits):
        steered = logits(model, inputs)
    with steer(llava, random_sae(), last_read, edits):
        torch.testing.assert_close(steered, logits(llava, inputs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, logits(llava, inputs), atol=1e-2)
    after = logits(model, inputs)
    assert torch.equal(after, before) if warm else torch.allclose(after, logits(llava, inputs), atol=1e-4)
    answerer = SteeredAnswers(model, llava_processor(), random_sae(), last_read, max_new_tokens=5)
    question = answerer.ask(pictures[0], PROMPT)
    answers = answerer.answers([SteeredRow(question, None), SteeredRow(question, tuple(edits))])
    assert answers == [one_at_a_time(llava, pictures[0], row_edits, last_read) for row_edits in (None, edits)]


@pytest.mark.gpu
def test_on_a_gpu_in_half_precision(llava, inputs):
    model = build_llava(build_clip()).eval().to("cuda", torch.float16)
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    before = logits(model, on_gpu)
    for sae_device in ("cuda", "cpu"):
        with steer(model, identity_sae().to(sae_device), LAYER, [scale(3, 1.0)], error="keep"):
            assert torch.equal(logits(model, on_gpu), before)
        with steer(model, random_sae().to(sae_device), LAYER, [clamp(5, ALPHA)]):
            assert not torch.equal(logits(model, on_gpu), before)
    assert torch.equal(logits(model, on_gpu), before)
