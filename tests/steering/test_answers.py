"""Answers in batches are those of one at a time."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from steered import ALPHA, GRID, LAYER, PROMPT, D, one_at_a_time, random_sae, residual, small_next

from saevlm_fast.box_making.architecture import build_clip, build_llava, llava_processor
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.steering.edits import add, clamp, scale, steer
from saevlm_fast.towers.load import find_anatomy


@pytest.mark.parametrize(
    ("layer", "options"), [(0, {}), (3, {}), (2, {"error": "keep", "tokens": "patches"}), (1, {"only": True})]
)
def test_answers_in_batches_are_those_of_one_at_a_time(llava, pictures, layer, options):
    answerer = SteeredAnswers(llava, llava_processor(), random_sae(), layer, batch_size=4, max_new_tokens=5, **options)
    asked = [answerer.ask(picture, PROMPT) for picture in pictures]
    edits = [None, (), (clamp(5, ALPHA),), (clamp(6, -ALPHA), scale(9, 2.0))]
    rows = [SteeredRow(question, edit) for edit in edits for question in asked]
    seen = []
    answers = answerer.answers(rows, on_rows=seen.append)
    assert answers == [one_at_a_time(llava, pictures[row.question], row.edits, layer, **options) for row in rows]
    assert seen == [4, 8, 12]
    assert len(set(answers)) > 3


def test_answers_about_images_of_several_tiles_are_those_of_one_at_a_time():
    """LLaVA-NeXT: images of 1 + 2 and 1 + 4 tiles side by side in a batch."""
    import transformers as t

    torch.manual_seed(0)
    tokenizer, image_token = llava_processor().tokenizer, llava_processor().image_token
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    model = small_next(image_id, max(len(tokenizer), image_id + 1))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # as initialised, all answers are alike
            torch.nn.init.normal_(module.weight, std=0.4)
    images = t.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=GRID
    )
    processor = t.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=image_token,
    )
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((28, 56), (56, 56), (56, 28), (56, 56))]
    prompt = f"user: {image_token} {PROMPT} assistant:"
    answerer = SteeredAnswers(model, processor, random_sae(32), 2, batch_size=5, max_new_tokens=5, tokens="patches")
    asked = [answerer.ask(picture, prompt) for picture in pictures]
    edits = [None, (), (clamp(5, ALPHA),), (clamp(9, -ALPHA), add(3, 8.0))]
    rows = [SteeredRow(question, edit) for edit in edits for question in asked]
    expected = []
    for row in rows:
        inputs = processor(text=[prompt], images=[pictures[row.question]], return_tensors="pt")
        with nullcontext() if row.edits is None else steer(model, random_sae(32), 2, row.edits, tokens="patches"):
            tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        expected.append(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
    assert answerer.answers(rows) == expected
    assert len(set(expected)) > 4


def test_the_mean_residual_is_of_the_chosen_tokens(llava, pictures):
    answerer = SteeredAnswers(llava, llava_processor(), random_sae(), LAYER, tokens="patches")
    x_TD = answerer._questions[answerer.ask(pictures[0], PROMPT)].x_BTD[0]
    mean_D = answerer.mean_residual(pictures[0], PROMPT)
    torch.testing.assert_close(mean_D, x_TD[1:].mean(0))
    mean_D /= mean_D.norm()  # people make directions of them, which an inference tensor would refuse


@pytest.mark.parametrize("input_norm", ["none", "layer_norm", "token_norm"])
def test_a_direction_is_added_after_the_edits(llava, pictures, input_norm):
    """A decoder row as direction is the edit of its latent, whatever the SAE does to its inputs."""
    sae = random_sae()
    sae.config = replace(sae.config, input_norm=input_norm)
    answerer = SteeredAnswers(llava, llava_processor(), sae, LAYER, max_new_tokens=1, tokens="patches")
    question = answerer.ask(pictures[0], PROMPT)
    direction = ALPHA * sae.W_dec[5].detach()
    rows = [SteeredRow(question, (), direction), SteeredRow(question, (add(5, ALPHA),)), SteeredRow(question, ())]
    added, steered, plain = residual(llava, lambda: answerer.answers(rows))
    torch.testing.assert_close(added, steered, rtol=1e-5, atol=1e-5)
    assert torch.equal(added[0], plain[0])  # CLS
    assert not torch.isclose(added[1:], plain[1:], atol=1e-2).all(1).any()


def test_a_row_may_have_a_mask_of_its_own(llava, pictures):
    sae, mask = random_sae(), torch.zeros(37, dtype=torch.bool)
    mask[3:7] = True
    answerer = SteeredAnswers(llava, llava_processor(), sae, LAYER, max_new_tokens=1)
    question, edits = answerer.ask(pictures[0], PROMPT), (clamp(5, ALPHA),)
    rows = [SteeredRow(question, edits, mask=mask), SteeredRow(question, edits), SteeredRow(question, None)]
    masked, everywhere, untouched = residual(llava, lambda: answerer.answers(rows))
    assert torch.equal(masked, torch.where(mask[:, None], everywhere, untouched))
    assert not torch.equal(everywhere[mask], untouched[mask])
    with pytest.raises(ValueError, match=r"^mask: \[5\], not 37 tokens$"):
        answerer.answers([SteeredRow(question, edits, mask=mask[:5])])


def test_the_lower_tower_runs_once_for_each_image(llava, pictures):
    calls = []
    handle = find_anatomy(llava).blocks[1].register_forward_hook(lambda m, args, out: calls.append(args[0].shape[:2]))
    try:
        answerer = SteeredAnswers(llava, llava_processor(), random_sae(), LAYER, max_new_tokens=2, batch_size=8)
        asked = [answerer.ask(picture, PROMPT) for picture in pictures]
        answerer.answers([SteeredRow(question, (clamp(k, 9.0),)) for question in asked for k in range(8)])
    finally:
        handle.remove()
    assert calls == [(1, 37)] * 3 + [(1, 1)] * 3


def test_several_read_layers_are_all_right(pictures):
    """The projector reads a block below the steered one too: nothing may be skipped."""
    torch.manual_seed(0)
    model = build_llava(build_clip())
    config = model.config
    config.vision_feature_layer = [1, -2]
    model = type(model)(config).eval()
    answerer = SteeredAnswers(model, llava_processor(), random_sae(), LAYER, max_new_tokens=5)
    question = answerer.ask(pictures[0], PROMPT)
    answers = answerer.answers([SteeredRow(question, edits) for edits in (None, (clamp(5, ALPHA),))])
    assert answers == [one_at_a_time(model, pictures[0], e, LAYER) for e in (None, [clamp(5, ALPHA)])]


def test_answers_refused_in_one_line(llava, pictures):
    with pytest.raises(ValueError, match=r"^model: CLIPVisionModel has no language model that answers$"):
        SteeredAnswers(build_clip().vision_model, llava_processor(), random_sae(), LAYER)
    with pytest.raises(ValueError, match=r"^tokens: a mask must be \[T\] here; SteeredRow.mask is one of a row's own$"):
        SteeredAnswers(llava, llava_processor(), random_sae(), LAYER, tokens=torch.ones(2, 37, dtype=torch.bool))
    answerer = SteeredAnswers(llava, llava_processor(), random_sae(), LAYER)
    with pytest.raises(ValueError, match=r"^question: 0 of 0 asked$"):
        answerer.answers([SteeredRow(0, None)])
    answerer.ask(pictures[0], PROMPT)
    with pytest.raises(ValueError, match=r"^direction: needs edits"):
        answerer.answers([SteeredRow(0, None, torch.ones(D))])
    with pytest.raises(ValueError, match=r"^mask: needs edits"):
        answerer.answers([SteeredRow(0, None, mask=torch.ones(37, dtype=torch.bool))])
    with pytest.raises(ValueError, match=r"^mask: torch.float32, must be bool$"):
        answerer.answers([SteeredRow(0, (), mask=torch.ones(37))])
    with pytest.raises(ValueError, match=rf"^direction: \[5\], not \[{D}\]$"):
        answerer.answers([SteeredRow(0, (), torch.ones(5))])
    with pytest.raises(ValueError, match=r"^direction: of row 1 of the batch, is not finite$"):
        answerer.answers([SteeredRow(0, ()), SteeredRow(0, (), torch.full((D,), float("nan")))])
