"""The language model of every family of LLaVA as a tower, at a tiny width with random weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlms import FAMILIES, tiny_vlm

from saevlm_fast.towers.language import LanguageTower, language_blocks, load_language
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint

POINTS = [HookPoint("language", 0), HookPoint("language", 1)]
CAPTIONS = ["a red square", "two things and a blue circle on the red square", "a"]


def pictures():
    noise = np.random.default_rng(0)
    sizes = ((40, 56), (64, 30), (32, 32))
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def refused(tower, message, points=POINTS):
    with pytest.raises(ValueError, match=message), tower.hooked(points):
        pass


def said(tower, selected, n=3):
    """What the chosen tokens say, pair by pair."""
    ids, rows = selected.details["token_id"], selected.image_of_row
    return [" ".join(tower.pieces(ids[rows == i].tolist())) for i in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_models_own_and_captions_are_found(family):
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM needs it")
    model, processor = tiny_vlm(family)
    tower = LanguageTower(family, model, processor, "describe the image .")
    pairs = list(zip(pictures(), CAPTIONS))
    with tower.hooked(POINTS) as run:
        inputs = tower.preprocess(pairs)
        acts = run(inputs)
        text = run.select(acts[POINTS[0]], Tokens.parse("text"), ["a", "b", "c"], 0, inputs)
        image = run.select(acts[POINTS[0]], Tokens.parse("image"), ["a", "b", "c"], 0, inputs)
        alone = [run(single := tower.preprocess([pair]))[POINTS[1]][0][single["modality"][0] > 0] for pair in pairs]
    assert said(tower, text) == CAPTIONS
    image_id = next(
        getattr(model.config, n) for n in ("image_token_id", "image_token_index") if hasattr(model.config, n)
    )
    assert set(image.details["token_id"].tolist()) == {image_id}
    assert sorted(set(image.image_of_row.tolist())) == [0, 1, 2]
    with torch.inference_mode():
        given = {name: x for name, x in inputs.items() if name != "modality"}
        out = model(**given, output_hidden_states=True, use_cache=False)
    states = getattr(out, "hidden_states", None) or out.language_model_outputs.hidden_states
    real = inputs["modality"] > 0
    assert (states[1][real] - acts[POINTS[0]][real]).abs().max() <= 1e-6 * states[1].abs().max()
    for i, rows in enumerate(alone):  # the other pairs of a batch change rounding alone
        together = acts[POINTS[1]][i][real[i]]
        assert (rows - together).norm() <= 1e-4 * rows.norm()


def test_cross_attention_is_refused_by_name():
    model, processor = tiny_vlm("mllama")
    tower = LanguageTower("mllama", model, processor, None)
    with (
        pytest.raises(ValueError, match="MllamaForConditionalGeneration does not bring images into its language model"),
        tower.hooked(POINTS),
    ):
        pass


def test_tokens_that_are_wrongly_taken_for_the_image_are_found_out():
    model, processor = tiny_vlm("llava")
    tower = LanguageTower("llava", model, processor, None)
    tower.preprocess.image_id = processor.tokenizer.convert_tokens_to_ids("user")
    refused(tower, "tokens of LlavaForConditionalGeneration that are not the image's depend on its pixels")


def test_a_model_that_mixes_the_pairs_of_a_batch_is_refused():
    model, processor = tiny_vlm("llava")
    blocks, _ = language_blocks(model)
    blocks[0].register_forward_hook(lambda module, args, output: output + output.mean(0, keepdim=True))
    refused(LanguageTower("llava", model, processor, None), "of a pair is another one in a batch")


@pytest.mark.parametrize("side", ["left", "right"])
def test_whatever_side_the_processor_fills_up(side):
    model, processor = tiny_vlm("llava")
    processor.tokenizer.padding_side = side
    tower = LanguageTower("llava", model, processor, None)
    with tower.hooked(POINTS) as run:
        inputs = tower.preprocess(list(zip(pictures(), CAPTIONS)))
        rows = run.select(run(inputs)[POINTS[1]], Tokens.parse("all"), ["a", "b", "c"], 0, inputs)
    n = (inputs["attention_mask"] > 0).sum(1)
    assert len(rows.rows_MD) == int(n.sum())
    for i in range(3):
        assert rows.positions[rows.image_of_row == i].tolist() == list(range(int(n[i])))
    assert 0 not in rows.details["token_id"].tolist()  # <pad>


def test_last_is_the_token_that_the_answer_begins_at():
    model, processor = tiny_vlm("llava")
    tower = LanguageTower("llava", model, processor, None)
    with tower.hooked(POINTS) as run:
        inputs = tower.preprocess(list(zip(pictures(), CAPTIONS)))
        last = run.select(run(inputs)[POINTS[1]], Tokens.parse("last"), ["a", "b", "c"], 0, inputs)
    assert said(tower, last) == [":"] * 3
    assert last.positions.tolist() == ((inputs["attention_mask"] > 0).sum(1) - 1).tolist()


def test_pairs_that_do_not_fit_are_refused_with_a_reason():
    model, processor = tiny_vlm("llava")
    tower = LanguageTower("llava", model, processor, None)
    tower.preprocess.window = 30
    picture = pictures()[0]
    tower.preprocess([(picture, "a red square")])
    with pytest.raises(ValueError, match=r"its prompt has 71 tokens, the model's window 30"):
        tower.preprocess([(picture, " ".join(["red"] * 50))])
    with pytest.raises(ValueError, match="the caption holds <image>"):
        tower.preprocess([(picture, "a <image> of a square")])


@pytest.mark.parametrize(
    ("spec", "prompt", "said"),
    [
        ("timm:vit_tiny_patch16_224", None, "no language part"),
        ("hf:tiny-clip", None, "CLIPConfig"),
        ("hf:tiny-llava", " ", "prompt: is empty"),
    ],
)
def test_models_without_a_language_part(spec, prompt, said):
    with pytest.raises(ValueError, match=said) as caught:
        load_language(spec, prompt=prompt)
    assert "\n" not in str(caught.value)


def test_points_of_the_other_kind_of_tower():
    tower = load_language("hf:tiny-llava")
    for point, message in (
        (HookPoint("residual", 0), "point: residual"),
        (HookPoint("language", 3), "blocks are 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message), tower.hooked([point]):
            pass
    with pytest.raises(ValueError, match="point: language of hf:tiny-clip"):
        load_tower("hf:tiny-clip").module(HookPoint("language", 0))
