"""What a LLaVA is given to read: the ids of the processor's own chat template, whatever kind of template that is."""

import json
import shutil

import pytest
import torch
from PIL import Image

from saevlm_fast.box.models import model_directory
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.towers.text import load_llava

PICTURE, QUESTION = Image.new("RGB", (48, 48), "red"), "What colour is the object?"
PARTS = (
    "{% for message in messages %}user: {% for part in message['content'] if part['type'] == 'image' %}<image> "
    "{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
    "assistant:{% endfor %}"
)
STRING = "{% for message in messages %}{{ 'user: ' + message['content'] + ' assistant:' }}{% endfor %}"
FILTERED = "{% for message in messages %}user: {{ message['content'] | string }} assistant:{% endfor %}"


@pytest.fixture
def directory(tmp_path):
    return shutil.copytree(model_directory("tiny-llava"), tmp_path / "model")


def asked(directory, template=None, prompt=QUESTION):
    """(answers, ids of the question, processor)."""
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    model, processor = load_llava(f"hf:{directory}")
    torch.manual_seed(0)
    answers = SteeredAnswers(model, processor, SparseAutoencoder(SAEConfig(128, 256, 4, "topk")), 3, max_new_tokens=4)
    answers.ask(PICTURE, prompt)
    return answers, answers._questions[0].inputs["input_ids"][0].tolist(), processor


@pytest.mark.parametrize("template", [None, PARTS, "{{ bos_token }}" + PARTS])
def test_ids_are_those_of_the_processors_own_template(directory, template):
    _, ids, processor = asked(directory, template)
    parts = [{"type": "image", "image": PICTURE}, {"type": "text", "text": QUESTION}]
    conversation = [{"role": "user", "content": parts}]
    own = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ids == list(own["input_ids"][0])
    assert ids.count(processor.tokenizer.bos_token_id) <= 1


def test_a_prompt_that_holds_the_image_itself_is_taken_as_it_is(directory):
    _, plain, processor = asked(directory, prompt=f"<image> {QUESTION}")
    bos = processor.tokenizer.bos_token
    _, begun, _ = asked(directory, prompt=f"{bos}<image> {QUESTION}")
    assert begun.count(processor.tokenizer.bos_token_id) == 1
    assert begun[-5:] == plain[-5:]


@pytest.mark.parametrize("template", [STRING, FILTERED])
def test_templates_of_one_string_are_given_the_image_token(directory, template):
    _, ids, processor = asked(directory, template)
    text = f"user: <image>\n{QUESTION} assistant:"
    assert ids == processor(images=[PICTURE], text=[text])["input_ids"][0]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages[0]['content']['nothing'].more }}", "has no attribute"),
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("fixed text", "it renders no image token"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_templates_that_cannot_be_used_are_one_line(directory, template, why):
    with pytest.raises(ValueError, match=rf"^prompt: the processor's chat template cannot be used .*{why}") as error:
        asked(directory, template)
    assert "\n" not in str(error.value)
    assert "may hold <image> itself" in str(error.value)


def test_prompts_longer_than_the_window_are_refused(directory):
    with pytest.raises(ValueError, match=r"^prompt: with its image it has \d+ tokens, the window of Llava.* 256$"):
        asked(directory, prompt="what " * 240)


def test_processors_saved_before_they_knew_the_patch_size(directory):
    """They are as the model's configuration says: the same ids and answers."""
    answers, ids, _ = asked(directory)
    rows = [SteeredRow(0, None), SteeredRow(0, ())]
    expected = answers.answers(rows)
    path = directory / "processor_config.json"
    settings = json.loads(path.read_text())
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        del settings[name]
    path.write_text(json.dumps(settings))
    answers, found, _ = asked(directory)
    assert found == ids
    assert answers.answers(rows) == expected


def test_what_a_processor_raises_is_one_line(directory):
    model, processor = load_llava(f"hf:{directory}")
    processor.patch_size = None
    answers = SteeredAnswers(model, processor, SparseAutoencoder(SAEConfig(128, 256, 4, "topk")), 3)
    with pytest.raises(ValueError, match=r"^prompt: the processor of LlavaForConditionalGeneration: TypeError: "):
        answers.ask(PICTURE, QUESTION)
