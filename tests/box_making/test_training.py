"""The trained models are used through transformers: what training computes must be what a user's call computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saevlm_fast.box import models
from saevlm_fast.box.scenes import OBJECT_FACTORS, VALUES, Scenes, value_prompts
from saevlm_fast.box_making import cards as box_cards
from saevlm_fast.box_making import evaluation as box_evaluation
from saevlm_fast.box_making.architecture import (
    build_clip,
    build_llava,
    build_tokenizer,
    clip_processor,
    llava_processor,
)
from saevlm_fast.box_making.evaluation import reply, zero_shot
from saevlm_fast.box_making.language import DESCRIBE, ONE_WORD, Question
from saevlm_fast.box_making.training import (
    ClipWithHeads,
    _conversation,
    _publish,
    clip_batch,
    clip_loss,
    llava_batch,
    llava_loss,
    lr_at,
    pixels,
    train,
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory, clip = tmp_path_factory.mktemp("assets"), build_clip()
    _publish(clip, clip_processor(), directory / "tiny-clip", {})
    _publish(build_llava(clip), llava_processor(), directory / "tiny-llava", {})
    return directory


def test_both_models_together_are_small(assets: Path) -> None:
    assert sum(file.stat().st_size for file in assets.rglob("*") if file.is_file()) <= 13_000_000


def test_clip_loss_is_the_contrastive_loss_without_the_captions_that_fit(assets: Path) -> None:
    """Pair by pair in float64, from the model and the processor that were saved."""
    from transformers import AutoProcessor, CLIPModel

    clip, processor = (
        CLIPModel.from_pretrained(assets / "tiny-clip"),
        AutoProcessor.from_pretrained(assets / "tiny-clip"),
    )
    batch = clip_batch(processor.tokenizer, seed=0, step=3, batch_size=6)
    images, tokens, scene, fit, *_ = batch
    texts = [processor.tokenizer.decode(ids, skip_special_tokens=True) for part in tokens for ids in part]
    inputs = processor(text=texts, images=list(Scenes(0).batch(18, 6).images), padding=True, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], images)
    all_logits = clip(**inputs).logits_per_image.double()
    logits, texts = all_logits[:, : len(scene)], texts[: len(scene)]
    losses = []
    for m, n in enumerate(scene.tolist()):
        texts_left = [logits[n, j] for j in range(len(texts)) if j == m or not fit[n, j]]
        images_left = [logits[i, m] for i in range(6) if i == n or not fit[i, m]]
        losses += [torch.stack(left).logsumexp(0) - logits[n, m] for left in (texts_left, images_left)]
    with_heads = ClipWithHeads(clip)
    seen = clip.vision_model(pixel_values=images)
    of_image = torch.cat([head(seen.pooler_output) for head in with_heads.of_image.values()], dim=1).double()
    values = value_loss(all_logits[:, len(scene) :]) + value_loss(of_image)
    expected = torch.stack(losses).mean() + values + patch_loss(with_heads, seen.last_hidden_state[:, 1:])
    torch.testing.assert_close(clip_loss(with_heads, batch).double(), expected, rtol=0.02, atol=0.02)


def value_loss(logits: torch.Tensor) -> torch.Tensor:
    """Value by value in float64, with what a scene shows read off its labels."""
    labels = Scenes(0).batch(18, len(logits))
    first, of_factors = 0, []
    for factor, values in VALUES.items():
        losses = []
        for n in range(len(logits)):
            shown = [values.index(name) for name in labels.labels(n)[factor]]
            absent = [logits[n, first + v] for v in range(len(values)) if v not in shown]
            for v in dict.fromkeys(shown):
                losses.append(torch.stack([logits[n, first + v], *absent]).logsumexp(0) - logits[n, first + v])
        of_factors.append(torch.stack(losses).mean())
        first += len(values)
    return torch.stack(of_factors).mean()


def patch_loss(model: ClipWithHeads, tokens: torch.Tensor) -> torch.Tensor:
    """Patch by patch in float64: 8 x 8 pixels each, row by row, an object's if it covers more than 0.15 of them."""
    scenes = Scenes(0).batch(18, len(tokens))
    losses: dict[str, list[torch.Tensor]] = {factor: [] for factor in OBJECT_FACTORS}
    for n in range(len(tokens)):
        for t in range(36):
            top, left = t // 6 * 8, t % 6 * 8
            share = scenes.masks[n, :, top : top + 8, left : left + 8].mean(axis=(1, 2))
            if share.max() > 0.15:
                for f, factor in enumerate(OBJECT_FACTORS):
                    logits = model.of_patch[factor](tokens[n, t]).double()
                    losses[factor].append(-logits.log_softmax(0)[scenes.objects[n, share.argmax(), f]])
    return sum(torch.stack(each).mean() for each in losses.values())


def test_llava_is_trained_on_what_a_user_calls(assets: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(assets / "tiny-llava").eval()
    processor = AutoProcessor.from_pretrained(assets / "tiny-llava")
    batch = llava_batch(processor.tokenizer, seed=0, step=0, batch_size=3)
    images, tokens, labels = batch
    theirs = llava(input_ids=tokens, pixel_values=images, labels=labels).loss
    torch.testing.assert_close(llava_loss(llava, batch).double(), theirs.double(), rtol=0.02, atol=0.02)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ONE_WORD}]}
    chat = processor.apply_chat_template([message], add_generation_prompt=True)
    ids = processor(text=[chat], images=list(Scenes(0).batch(0, 1).images))["input_ids"][0]
    asked, targets = _conversation(processor.tokenizer, [Question(ONE_WORD, "star", "word")])
    assert list(ids) == asked[:-2]
    assert processor.tokenizer.decode(targets[-2:]) == "star <eos>"


def test_a_reply_does_not_depend_on_its_neighbours(assets: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(assets / "tiny-llava").eval()
    processor = AutoProcessor.from_pretrained(assets / "tiny-llava")
    images, asked = list(Scenes(0).batch(0, 2).images), [ONE_WORD, DESCRIBE]
    alone = [reply(llava, processor, [image], [text])[0] for image, text in zip(images, asked)]
    assert reply(llava, processor, images, asked) == alone


def test_the_tower_is_clips_and_stays_so(assets: Path, tmp_path: Path) -> None:
    clip = build_clip("eager")
    llava, tokenizer = build_llava(clip, "eager"), build_tokenizer(ends=False)
    before = llava.lm_head.weight.clone()
    train(llava, llava_loss, lambda step: llava_batch(tokenizer, 0, step, 4), tmp_path, 2, 1e-3)
    theirs = clip.vision_model.state_dict()
    tower = llava.model.vision_tower.state_dict()
    shared = [name for name in tower if name.removeprefix("vision_model.") in theirs]
    assert len(shared) > 80
    assert all(torch.equal(tower[name], theirs[name.removeprefix("vision_model.")]) for name in shared)
    assert not torch.equal(llava.lm_head.weight, before)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saevlm_fast.box_making.training._SAVE_EVERY", 2)
    tokenizer, weights = build_tokenizer(ends=True), []

    def run(directory: Path, fail_at: int) -> None:
        torch.manual_seed(1)
        model = ClipWithHeads(build_clip("eager"))

        def batch_of(step: int):
            if step == fail_at:
                raise KeyboardInterrupt
            return clip_batch(tokenizer, 0, step, 4)

        train(model, clip_loss, batch_of, directory, 5, 1e-3)
        weights.append(torch.cat([w.flatten() for w in model.parameters()]))

    run(tmp_path / "unbroken", -1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", 3)
    run(tmp_path / "broken", -1)
    assert torch.equal(weights[0], weights[1])


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [lr_at(step, 4000, 1.0) for step in range(4000)]
    assert rates[0] < 0.02
    assert rates[1000] == rates[2999] == 1.0
    assert 0 < rates[-1] < 0.01


def test_zero_shot_of_a_model_that_knows(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings made from the labels themselves give 100 %, shuffled ones chance."""
    scenes = Scenes(0, "test").batch(0, 300)
    sizes = {factor: len(values) for factor, values in VALUES.items()}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()])))
    known = torch.zeros(len(scenes), sum(sizes.values()))
    for i in range(len(scenes)):
        for factor, values in scenes.labels(i).items():
            known[i, [starts[factor] + VALUES[factor].index(value) for value in values]] = 1
    prompts = {text: starts[f] + v for f in VALUES for v, text in enumerate(value_prompts(f))}
    monkeypatch.setattr(
        "saevlm_fast.box_making.evaluation._image_embeddings", lambda clip, processor, images: known[: len(images)]
    )
    monkeypatch.setattr("saevlm_fast.box_making.evaluation._starts", lambda scenes: [0])
    monkeypatch.setattr("saevlm_fast.box_making.evaluation._BATCH", len(scenes))
    monkeypatch.setattr(
        "saevlm_fast.box_making.evaluation._text_embeddings",
        lambda clip, processor, texts: torch.eye(known.shape[1])[[prompts[text] for text in texts]],
    )
    results = zero_shot(None, None, scenes)
    assert all(accuracy == 1 for accuracy, _ in results.values())
    assert all(results[factor][1] == 1 for factor in ("shape", "colour", "texture", "size", "place"))
    known[:] = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))]
    assert zero_shot(None, None, scenes)["shape"][0] < 0.35


def test_pixels_are_the_image_processors() -> None:
    images = Scenes(0).batch(0, 3).images
    torch.testing.assert_close(
        pixels(images), clip_processor()(images=list(images), return_tensors="pt")["pixel_values"]
    )


def test_the_llava_learns_from_scenes_that_nothing_else_uses() -> None:
    """Neither tiny-clip's training nor any test: far on in the split train."""
    processor = llava_processor()
    pixel_values = llava_batch(processor.tokenizer, seed=0, step=2, batch_size=3)[0]
    expected = Scenes(0, "train").batch((2**30 + 2) * 3, 3).images
    assert torch.equal(pixel_values, pixels(expected))


def test_answers_are_counted_word_for_word(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = Scenes(0, "test").batch(0, 40)

    def says_one(llava: object, processor: object, images: list[np.ndarray], asked: list[str]) -> list[str]:
        return ["one" for _ in asked]

    monkeypatch.setattr(box_evaluation, "reply", says_one)
    accuracy = box_evaluation.answer_accuracy(None, None, scenes)
    assert accuracy["count"] == np.mean(scenes.setting[:, 2] == 0)
    assert {name for name, share in accuracy.items() if share > 0} == {"count"}


def test_the_shipped_llava_sees_through_the_shipped_clip() -> None:
    llava, clip = (load_file(models.ASSETS / name / "model.safetensors") for name in ("tiny-llava", "tiny-clip"))
    tower = {name.split("vision_tower.")[1]: weight for name, weight in llava.items() if "vision_tower." in name}
    assert len(tower) > 50
    for name, weight in tower.items():
        assert torch.equal(weight, clip[f"vision_model.{name.removeprefix('vision_model.')}"]), name


def test_cards_are_of_scenes_that_were_not_trained_on() -> None:
    assert box_cards._SPLITS == ("test", "novel")
    for name in models.MODELS:
        card = (models.ASSETS / name / "README.md").read_text()
        assert f"{json.loads((models.ASSETS / name / box_cards.RECORD).read_text())['steps']:,} steps" in card
