"""Editing the language model of a LLaVA."""

import pytest
import torch
from PIL import Image

from command import run, run_json
from saevlm_fast.box.models import model_directory
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import SteeredRow
from saevlm_fast.steering.edits import clamp, steer
from saevlm_fast.steering.language import LanguageAnswers
from saevlm_fast.towers.language import image_token_id
from saevlm_fast.towers.text import load_llava

QUESTION = "What colour is the object?"
PICTURES = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]


@pytest.fixture(scope="module")
def llava():
    return load_llava("hf:tiny-llava", dtype="float32")


def an_sae(d_in=128):
    torch.manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(d_in, 256, 8, "topk"))
    sae.reset_parameters(0)
    return sae


def own_answer(llava, picture, question=QUESTION):
    model, processor = llava
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), inputs


@pytest.mark.parametrize("layer", [0, 2])
def test_answers_without_edits_are_the_models_own_beside_edited_rows(llava, layer):
    answers = LanguageAnswers(*llava, an_sae(), layer, error="keep", max_new_tokens=8)
    asked = [answers.ask(picture, QUESTION) for picture in PICTURES]
    rows = [SteeredRow(q, edits) for q in asked for edits in (None, (), (clamp(3, 300.0),))]
    said = answers.answers(rows)
    for picture, (unsteered, kept, steered) in zip(PICTURES, (said[:3], said[3:])):
        assert unsteered == kept == own_answer(llava, picture)[0]
        assert steered != unsteered
    # An SAE that reconstructs nothing spoils an answer; beside such rows an untouched one stays the model's own.
    nothing = an_sae()
    with torch.no_grad():
        nothing.W_dec.zero_()
    answers = LanguageAnswers(*llava, nothing, layer, max_new_tokens=8)
    asked = [answers.ask(picture, QUESTION) for picture in PICTURES]
    said = answers.answers([SteeredRow(q, edits) for q in asked for edits in (None, ())])
    assert said[::2] == [own_answer(llava, picture)[0] for picture in PICTURES]
    assert said[0] != said[1]


@pytest.mark.parametrize("tokens", ["all", "text", "image", "last"])
def test_the_chosen_tokens_alone_are_changed_to_the_last_bit(llava, tokens):
    model, _ = llava
    sae = an_sae()
    answers = LanguageAnswers(*llava, sae, 1, tokens=tokens, error="keep", max_new_tokens=3)
    row = SteeredRow(answers.ask(PICTURES[0], QUESTION), (clamp(7, 50.0),))
    seen = []
    after = model.model.language_model.layers[2]
    reads = after.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        answers.answers([row])
        with torch.inference_mode():
            _, inputs = own_answer(llava, PICTURES[0])
            states = model(**inputs, output_hidden_states=True).hidden_states[2]
    finally:
        reads.remove()
    prompt = seen[0]
    ids = inputs["input_ids"][0]
    image = ids == image_token_id(model.config)
    last = torch.arange(len(ids)) == len(ids) - 1
    expected = {"all": torch.ones_like(image), "text": ~image, "image": image, "last": last}[tokens]
    changed = (prompt[0] != states[0]).any(1)
    assert torch.equal(changed, expected)
    moved = (prompt[0] - states[0])[expected]
    direction = sae.W_dec[7] / sae.W_dec[7].norm()
    assert (moved - (moved @ direction)[:, None] * direction).norm() <= 1e-3 * moved.norm()
    assert seen[1].shape[1] == 1  # a token of the answer


def test_a_rows_own_mask_and_rows_of_several_lengths(llava):
    answers = LanguageAnswers(*llava, an_sae(), 1, error="keep", max_new_tokens=4)
    short, long = answers.ask(PICTURES[0], "What size?"), answers.ask(PICTURES[0], QUESTION)
    n = answers._questions[long].length
    none, everything = torch.zeros(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    edits = (clamp(3, 300.0),)
    rows = [SteeredRow(long, edits, mask=none), SteeredRow(short, None), SteeredRow(long, edits, mask=everything)]
    said = answers.answers([*rows, SteeredRow(long, None)])
    assert said[0] == said[3]
    assert said[2] != said[3]
    with pytest.raises(ValueError, match="mask: "):
        answers.answers([SteeredRow(long, edits, mask=everything[1:])])


def test_the_context_manager_edits_every_token(llava):
    model, _ = llava
    expected, inputs = own_answer(llava, PICTURES[0])
    with torch.inference_mode():
        before = model(**inputs, output_hidden_states=True).hidden_states
        with steer(model, an_sae(), 0, [clamp(2, 9.0)], error="keep", part="language"):
            inside = model(**inputs, output_hidden_states=True).hidden_states
        after = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(inside[0], before[0])
    assert (inside[1] != before[1]).any(2).all()
    assert all(torch.equal(a, b) for a, b in zip(after, before))
    assert own_answer(llava, PICTURES[0])[0] == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer": 3}, "layer: 3 of LlavaForConditionalGeneration, whose language blocks are 0 to 2"),
        ({"tokens": "cls"}, "tokens: 'cls' is not one of all, text, image, last"),
        ({"sae": an_sae(64)}, "d_in is 64, but the language blocks of LlavaForConditionalGeneration have width 128"),
        ({"error": "x"}, "error: 'x'"),
    ],
)
def test_wrong_choices(llava, changes, said):
    given = {"sae": an_sae(), "layer": 1} | changes
    with pytest.raises(ValueError, match=said):
        LanguageAnswers(*llava, given.pop("sae"), given.pop("layer"), **given)


def test_wrong_choices_of_the_context_manager(llava):
    for given, said in (({"part": "x"}, "part: 'x'"), ({"part": "language", "tokens": "cls"}, "tokens: 'cls'")):
        with pytest.raises(ValueError, match=said), steer(llava[0], an_sae(), 1, **given):
            pass
    clip = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no language model"), steer(clip, an_sae(), 1, part="language"):
        pass


def test_the_command(tmp_path):
    PICTURES[0].save(tmp_path / "red.png")
    an_sae().save_pretrained(tmp_path / "sae")
    call = ("steer", "--model", f"hf:{model_directory('tiny-llava')}", "--sae", tmp_path / "sae", "--layer", 1)
    call += ("--image", tmp_path / "red.png", "--prompt", QUESTION, "--latent", 3, "--alpha", "300", "--device", "cpu")
    told = run_json(*call, "--part", "language", "--tokens", "image", "--error", "keep", "--max-new-tokens", 4)
    assert told["part"] == "language"
    assert told["controls"]["unsteered"] == told["controls"]["sae_attached"]
    assert "tokens: cls is not one of all, text, image, last (part language)" in run(
        *call, "--part", "language", "--tokens", "cls", code=2
    )
    assert "tokens: image is not one of all, patches, cls (part vision)" in run(*call, "--tokens", "image", code=2)
