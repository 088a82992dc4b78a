"""Edits that are refused in one line, and numbers that are none."""

import re
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from steered import ALPHA, LAYER, PROMPT, S, alone, by_hand, logits, random_sae, residual

from saevlm_fast.box_making.architecture import llava_processor
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.steering.edits import add, clamp, scale, steer, steer_rows, zero

LLAVA, READ = "LlavaForConditionalGeneration", "(vision_feature_layer -2)"
CHOICES = "is not one of all, patches, cls, or a bool mask [T] or [B, T]"
REFUSED = {
    "unread": ({"layer": 4}, f"layer: 4 changes nothing, the language model reads vision blocks up to 3 {READ}"),
    "no such layer": ({"layer": 5}, f"layer: 5 of {LLAVA}, whose vision blocks are 0 to 4"),
    "negative": ({"layer": -1}, f"layer: -1 of {LLAVA}, whose vision blocks are 0 to 4"),
    "width": ({"sae": random_sae(64)}, f"sae: d_in is 64, but the vision blocks of {LLAVA} have width 128"),
    "latent": ({"edits": [clamp(S, 1.0)]}, "latent: 96 of an SAE whose latents are 0 to 95"),
    "twice": ({"edits": [clamp(3, 1.0), zero(3)]}, "latent: 3 is edited twice"),
    "cls unread": (
        {"layer": 3, "tokens": "cls"},
        f"tokens: cls at layer 3 changes nothing, the language model reads that block {READ} without CLS",
    ),
    "tokens": ({"tokens": "some"}, f"tokens: 'some' {CHOICES}"),
    "mask": ({"tokens": torch.ones(37)}, f"tokens: torch.float32 [37] {CHOICES}"),
    "no token": (
        {"tokens": torch.zeros(37, dtype=torch.bool)},
        "tokens: the mask chooses none, so that steering changes nothing",
    ),
    "mask of CLS": (
        {"layer": 3, "tokens": torch.arange(37) == 0},
        f"tokens: cls at layer 3 changes nothing, the language model reads that block {READ} without CLS",
    ),
    "error": ({"error": "lose"}, "error: 'lose' is not one of drop, keep"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(llava, name):
    options, message = REFUSED[name]
    arguments = {"sae": random_sae(), "layer": LAYER, **options}
    with pytest.raises(ValueError) as raised, steer(llava, **arguments):  # noqa: PT011 (compared whole)
        pass
    assert str(raised.value) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_alpha_must_be_finite_and_latents_not_negative(value):
    for make in (clamp, add, scale):
        with pytest.raises(ValueError, match=rf"^alpha: {re.escape(str(value))} of latent 3 is not finite in float32$"):
            make(3, value)
    with pytest.raises(ValueError, match=r"^latent: -1 must not be negative$"):
        clamp(-1, 1.0)


@pytest.mark.parametrize("latent", [547.9, True, "3", None])
def test_a_latent_is_a_whole_number(latent):
    with pytest.raises(ValueError, match=rf"^latent: {latent!r} is not a whole number$"):
        clamp(latent, 1.0)


def test_numbers_of_numpy_are_numbers(llava, inputs):
    run = partial(logits, llava, inputs)
    with steer(llava, random_sae(), LAYER, [clamp(5, ALPHA)]):
        expected = run()
    with steer(llava, random_sae(), LAYER, [clamp(np.int64(5), np.float32(ALPHA))]):
        assert torch.equal(run(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_edit_that_overflows_the_model_is_refused(llava, inputs, pictures, dtype):
    """Else the model would answer every question with nothing, which may score well."""
    model, alpha = deepcopy(llava).to(dtype), {torch.float16: 1e6, torch.float32: 3e38}[dtype]
    sae, name = random_sae(), str(dtype).removeprefix("torch.")
    with torch.no_grad():
        sae.W_dec *= 30
    message = rf"^alpha: {re.escape(f'{alpha:g}')} of latent 5 overflows {name}, which the model computes in$"
    with pytest.raises(ValueError, match=message), steer(model, sae, LAYER, [zero(4), clamp(5, alpha)]):
        logits(model, inputs)
    answerer = SteeredAnswers(model, llava_processor(), sae, LAYER, max_new_tokens=1)
    question = answerer.ask(pictures[0], PROMPT)
    rows = [
        SteeredRow(question, None),
        SteeredRow(question, (clamp(7, 1.0),)),
        SteeredRow(question, (clamp(5, alpha),)),
    ]
    with pytest.raises(ValueError, match=message):
        answerer.answers(rows)
    masked = SteeredRow(question, (clamp(5, alpha),), mask=torch.zeros(37, dtype=torch.bool))
    assert len(answerer.answers([*rows[:2], masked])) == 3  # it reaches no token


def test_an_edit_that_overflows_the_sae_is_refused(llava):
    message = "^alpha: 100000 of latent 3 overflows the SAE's float16$"
    with pytest.raises(ValueError, match=message), steer(llava, random_sae().half(), LAYER, [clamp(3, 1e5)]):
        pass


@pytest.mark.parametrize("edits", [clamp(5, 1.0), [5], None], ids=str)
def test_edits_are_a_sequence_of_edits(llava, edits):
    steering = steer(llava, random_sae(), LAYER, edits)
    with pytest.raises(ValueError, match=r"^edits: .* is not (a sequence of edits|made by clamp)"), steering:
        pass


def test_only_with_rows_of_different_numbers_of_edits(llava, inputs):
    """Short rows are filled up with edits of latent 0 that must not count."""
    sae = random_sae()
    with torch.no_grad():
        sae.b_enc[0] = 50.0  # fires everywhere
    x = residual(llava, partial(logits, llava, inputs))
    rows = [[scale(5, 1.0), scale(6, 1.0)], [scale(7, 1.0)], []]
    with steer_rows(llava, sae, LAYER, rows, only=True):
        steered = residual(llava, partial(logits, llava, inputs))
    everywhere = torch.ones(x.shape[:2], dtype=torch.bool)
    for row, latents in enumerate(([5, 6], [7], [])):
        expected = by_hand(sae, x[row : row + 1], alone(latents), everywhere[:1], "drop")
        torch.testing.assert_close(steered[row : row + 1], expected, rtol=1e-5, atol=1e-4)


def test_a_block_that_is_not_called_is_an_error(llava, pictures, monkeypatch):
    answerer = SteeredAnswers(llava, llava_processor(), random_sae(), LAYER, max_new_tokens=1)
    question = answerer.ask(pictures[0], PROMPT)
    monkeypatch.setattr(llava, "generate", lambda input_ids, **_: input_ids)
    with pytest.raises(ValueError, match=r"^layer: 2 of .* was not called, so that nothing is steered$"):
        answerer.answers([SteeredRow(question, ())])


@pytest.mark.parametrize(("tiles", "message"), [([1], "1 numbers for 2 rows"), ([3, 0], "0 must be at least 1")])
def test_tiles_are_counted(llava, tiles, message):
    steering = steer_rows(llava, random_sae(), LAYER, [[], []], tiles=tiles)
    with pytest.raises(ValueError, match=f"^tiles: {message}"), steering:
        pass


def test_rows_must_fit_the_batch(llava, inputs):
    with (
        pytest.raises(ValueError, match=r"^rows: edits for 2 rows of the vision tower, but the batch has 3$"),
        steer_rows(llava, random_sae(), LAYER, [[], []]),
    ):
        logits(llava, inputs)
    with (
        pytest.raises(ValueError, match=r"^rows: edits for 0 rows of the vision tower, but the batch has 3$"),
        steer_rows(llava, random_sae(), LAYER, []),
    ):
        logits(llava, inputs)
    answerer = SteeredAnswers(llava, llava_processor(), random_sae(), LAYER)
    assert answerer.answers([]) == []
