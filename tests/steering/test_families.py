"""Every family of models that answer: which blocks its language model reads, and steering through each of them."""

import functools
import json

import pytest
import torch
from answering_models import MODELS, TEMPLATE, make
from many_towers import FAMILIES
from tower_makers import pictures, prepared

from command import run
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.steering.edits import clamp, scale, steer, steer_rows
from saevlm_fast.steering.site import hooked_output
from saevlm_fast.towers.load import find_anatomy
from tiny_tower import save_photos

WIDTH, QUESTION = 32, "what colour is the object"
# Blocks whose output reaches the language model; LLaVA-NeXT is made to read the last one but one.
LAST_READ = {"LLaVA-NeXT": 1, "Mllama": 2}


@functools.cache
def answering(name):
    return make(name)


def inputs_of(name, n=2):
    """Of the first pictures, one by one: their sizes differ."""
    model, processor = answering(name)
    answers = SteeredAnswers(model, processor, sae(), 0)
    return [answers._inputs(picture, prompt(name)) for picture in pictures(n)]


def prompt(name):
    return f"<image> {QUESTION}" if name == "PaliGemma" else QUESTION


def sae():
    torch.manual_seed(1)
    made = SparseAutoencoder(SAEConfig(WIDTH, 64, 8, "batch_topk")).eval()
    with torch.no_grad():
        made.threshold.fill_(0.1)
    return made


@torch.no_grad()
def logits(name, inputs):
    return answering(name)[0](**inputs).logits[:, -1]


@pytest.mark.parametrize("name", MODELS)
def test_the_last_block_that_is_read_is_known(name):
    """Found by changing what each block gives: above the last block that is read nothing reaches the answer."""
    model, _ = answering(name)
    (inputs,), anatomy = inputs_of(name, 1), find_anatomy(model)
    before, reached = logits(name, inputs), []
    for layer, block in enumerate(anatomy.blocks):
        with hooked_output(block, anatomy.form, lambda x_BTD: x_BTD.flip(2) + 1):
            reached += [layer] * (not torch.equal(logits(name, inputs), before))
    last = LAST_READ.get(name, 1)
    assert reached == list(range(last + 1))
    for layer in range(len(anatomy.blocks)):
        if layer <= last:
            with steer(model, sae(), layer):
                pass
        else:
            message = rf"layer: {layer} changes nothing, the language model reads vision blocks up to {last}"
            with pytest.raises(ValueError, match=message), steer(model, sae(), layer):
                pass


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_each_row_steered_alone(name):
    """Without the SAE, and with it but no edits at error keep, they and the logits are the model's own, to the bit."""
    model, processor = answering(name)
    answerer = SteeredAnswers(model, processor, sae(), 0, max_new_tokens=2, error="keep")
    numbers = [answerer.ask(picture, prompt(name)) for picture in pictures(2)]
    edits = [(clamp(latent, 80.0),) for latent in (3, 5)]
    answers = answerer.answers([SteeredRow(n, each) for n in numbers for each in (None, (), *edits)])
    alone = []
    for inputs in inputs_of(name):
        alone += 2 * [own_answer(name, inputs)]
        before = logits(name, inputs)
        with steer(model, sae(), 0, [scale(3, 1.0)], error="keep"):
            assert torch.equal(logits(name, inputs), before)
        for each in edits:
            with steer(model, sae(), 0, each, error="keep"):
                alone.append(own_answer(name, inputs))
        with steer(model, sae(), 0, edits[0]):
            assert not torch.allclose(logits(name, inputs), before, atol=1e-2)
        assert torch.equal(logits(name, inputs), before)
    assert answers == alone


def own_answer(name, inputs):
    model, processor = answering(name)
    tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


# Of one family always; of all of them by `pytest -m families`.
OTHERS = [pytest.param(name, marks=[] if name == "Qwen2.5-VL" else pytest.mark.families) for name in MODELS]


@pytest.mark.parametrize("name", OTHERS)
def test_the_commands_steer_each_of_them(name, tmp_path, request):
    """From files: codes and steering-score over photos, steer of one of them; a layer that is not read is one line."""
    if name != "Qwen2.5-VL" and "families" not in request.config.getoption("markexpr"):
        pytest.skip("takes longer: pytest -m families")
    model, processor = answering(name)
    processor.chat_template = processor.chat_template or TEMPLATE.replace("IMAGE", "<image>")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    sae().save_pretrained(tmp_path / "sae")
    save_photos(tmp_path / "photos", 4)
    spec, cpu = f"hf:{tmp_path / 'model'}", ("--device", "cpu")
    images = ("--images", tmp_path / "photos")
    harvest = ("harvest", *images, *cpu, "--workers", 0, "--model")
    codes, embeddings = tmp_path / "codes", tmp_path / "embeddings"
    run(*harvest, spec, "--layer", 0, "--tokens", "all", "--sae", tmp_path / "sae", "--pool", "mean", "--output", codes)
    run(*harvest, "hf:tiny-clip", "--point", "projection", "--output", embeddings)
    asked = ("--model", spec, "--sae", tmp_path / "sae", "--max-new-tokens", 2, *cpu)
    photo = tmp_path / "photos" / "class_0" / "photo_000.png"
    question = ("--image", photo, "--prompt", QUESTION, "--latent", 3, "--alpha", 50)
    assert "SAE, no edit" in run("steer", *asked, "--layer", 0, *question)
    score = ("--codes", codes, "--embeddings", embeddings, "--text-model", "hf:tiny-clip", "--latents", "0:2")
    output = ("--ask", 1, "--output", tmp_path / "score.json")
    run("steering-score", *asked, "--layer", 0, *images, *score, *output)
    assert len(json.loads((tmp_path / "score.json").read_text())["latents"]) == 2
    n_blocks = len(find_anatomy(model).blocks)
    if LAST_READ.get(name, 1) < n_blocks - 1:
        assert "changes nothing" in run("steer", *asked, "--layer", n_blocks - 1, *question, code=2)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "LLaVA with Pixtral"])
def test_rows_of_a_packed_batch_are_edited_each_in_its_own_way(name):
    """Two images of different grids, side by side in one sequence; a mask tells them apart too."""
    model, _ = answering(name)
    anatomy = find_anatomy(model)
    tower, given = anatomy.form.model, inputs_of(name, 2)
    arguments = [{key: value for key, value in each.items() if key.startswith(("pixel", "image_"))} for each in given]
    forward = functools.partial(_states, tower)
    with torch.no_grad():
        apart = []
        for each, edit in zip(arguments, (clamp(3, 80.0), clamp(5, 40.0))):
            with steer(model, sae(), 0, [edit]):
                apart.append(forward([each]))
        with steer_rows(model, sae(), 0, [[clamp(3, 80.0)], [clamp(5, 40.0)]]):
            together = forward(arguments)
        plain = forward(arguments)
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together, plain, atol=1e-2)
    n = len(apart[0])
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[1, :5] = True  # of the second image the first five patches
    with torch.no_grad(), steer(model, sae(), 0, [clamp(3, 80.0)], tokens=mask):
        masked = forward(arguments)
    torch.testing.assert_close(masked[:n], plain[:n], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(masked[n:], plain[n:], atol=1e-2)


def _states(tower, arguments):
    """[sum of T, D] after the last block."""
    if "image_grid_thw" in arguments[0]:
        joined = {key: torch.cat([each[key] for each in arguments]) for key in arguments[0]}
        return tower(joined["pixel_values"], grid_thw=joined["image_grid_thw"]).last_hidden_state
    height, width = (max(each["pixel_values"].shape[axis] for each in arguments) for axis in (2, 3))
    pixels = torch.zeros(len(arguments), 3, height, width)
    for i, each in enumerate(arguments):
        pixels[i, :, : each["pixel_values"].shape[2], : each["pixel_values"].shape[3]] = each["pixel_values"][0]
    return tower(pixels, image_sizes=torch.cat([each["image_sizes"] for each in arguments])).last_hidden_state[0]


@pytest.mark.parametrize(("library", "name"), [("timm", "ConvNeXt"), ("open_clip", "ResNet"), ("timm", "ResNet")])
@torch.no_grad()
def test_stages_are_steered_cell_by_cell(library, name):
    """A mask of cells: those alone change; without edits, and the error kept, nothing does."""
    (family,) = [each for each in FAMILIES if (each.name, each.library) == (name, library)]
    tower = family.make()
    model, inputs, anatomy = tower.model, prepared(tower, pictures(2)), tower.anatomy
    run_once = functools.partial(anatomy.call, model, dict(inputs))
    caught = []
    hook = anatomy.blocks[1].register_forward_hook(lambda module, args, output: caught.append(output))
    run_once()
    n_cells, width = anatomy.form.tokens(caught[0]).shape[1:]
    torch.manual_seed(1)
    stage_sae = SparseAutoencoder(SAEConfig(width, 16, 4, "topk")).eval()
    mask = torch.zeros(n_cells, dtype=torch.bool)
    mask[1] = True
    before = run_once()
    with steer(model, stage_sae, 1, error="keep"):
        assert torch.equal(run_once(), before)
    with steer(model, stage_sae, 1, [clamp(3, 80.0)], tokens=mask):
        assert not torch.allclose(run_once(), before, atol=1e-3)
    hook.remove()
    plain, steered = caught[0].flatten(2), caught[-1].flatten(2)
    assert torch.equal((plain != steered).any(1).any(0), mask)
    assert torch.equal(run_once(), before)
    with (
        pytest.raises(ValueError, match="tokens: cls, but the vision tower of"),
        steer(model, stage_sae, 1, tokens="cls"),
    ):
        pass
