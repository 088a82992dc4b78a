"""Steering hooks: against a plain re-implementation, and that nothing is left of them."""

import re
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from saevlm_fast.box_making.architecture import build_clip, build_llava, llava_processor
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.steering.edits import add, clamp, encode_tokens, scale, steer, steer_rows, zero
from saevlm_fast.steering.site import blocks_read
from saevlm_fast.towers.load import find_anatomy

D, S, LAYER, ALPHA = 128, 96, 2, 40.0
PROMPT = "What colour is the object?"


def random_sae(d_in=D, architecture="batch_topk", d_sae=S, k=8):
    """Latents that fire on a good part of the tokens; biases, so that nothing cancels by chance."""
    sae = SparseAutoencoder(SAEConfig(d_in, d_sae, k, architecture)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
        sae.b_dec.copy_(0.1 * torch.randn(d_in, generator=generator))
        if architecture != "topk":
            sae.threshold.fill_(0.5)
    return sae


def identity_sae(d_in=D):
    """z = (relu(x), relu(-x)), x_hat = relu(x) - relu(-x): exact, for every product is by 0 or 1."""
    sae = SparseAutoencoder(SAEConfig(d_in, 2 * d_in, 2 * d_in, "topk")).eval()
    eye = torch.eye(d_in)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.W_enc.copy_(torch.cat([eye, -eye]).T)
    return sae


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    model = build_llava(build_clip()).eval().requires_grad_(False)
    for block in model.model.vision_tower.modules():  # the library's initialisation gives all images nearly one answer
        if isinstance(block, torch.nn.Linear):
            torch.nn.init.normal_(block.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    return list(noise)


@pytest.fixture(scope="module")
def inputs(pictures):
    texts = [f"user: <image> {PROMPT} assistant:"] * len(pictures)
    return dict(llava_processor()(text=texts, images=pictures, return_tensors="pt"))


@torch.no_grad()
def residual(model, run, layer=LAYER):
    """The output of a block as later hooks, and so the model, see it; [B, T, D]."""
    anatomy, caught = find_anatomy(model), []
    keep = lambda module, args, output: caught.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handle = anatomy.blocks[layer].register_forward_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    return anatomy.form.tokens(caught[0])


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def by_hand(sae, x, change, mask, error):
    """Dense codes, a plain change of them, a plain product."""
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    z = torch.where(pre > sae.threshold, pre, 0)
    edited = change(z.clone())
    x_hat, new = (code @ sae.W_dec + sae.b_dec for code in (z, edited))
    return torch.where(mask[..., None], new if error == "drop" else x + new - x_hat, x)


def assigned(latent, value):
    def change(z):
        z[..., latent] = value(z[..., latent])
        return z

    return change


def alone(latents):
    def change(z):
        kept = torch.zeros_like(z)
        kept[..., latents] = z[..., latents]
        return kept

    return change


MODES = {
    "clamp": ([clamp(5, ALPHA)], assigned(5, lambda z: ALPHA), False),
    "add": ([add(5, ALPHA)], assigned(5, lambda z: z + ALPHA), False),
    "scale": ([scale(5, 3.0)], assigned(5, lambda z: 3 * z), False),
    "zero": ([zero(5)], assigned(5, lambda z: 0.0), False),
    "several": ([clamp(5, ALPHA), scale(7, -2.0)],
                lambda z: assigned(7, lambda v: -2 * v)(assigned(5, lambda v: ALPHA)(z)), False),
    "only": ([clamp(5, ALPHA), scale(7, 1.0)], lambda z: assigned(5, lambda v: ALPHA)(alone([5, 7])(z)), True),
    "nothing": ([], torch.zeros_like, True),
    "identity": ([], lambda z: z, False),
}  # fmt: skip


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


# --- other models ----------------------------------------------------------------------------------------------------


def vision_settings(**more):
    return {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4,
            "image_size": 28, "patch_size": 14, **more}  # fmt: skip


def language_settings():
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


GRID = [[28, 56], [56, 28], [56, 56]]


def small_next(image_token_index=63, vocab_size=64, **options):
    import transformers as t

    text = t.LlamaConfig(**(language_settings() | {"vocab_size": vocab_size}))
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**vision_settings()), text_config=text, image_grid_pinpoints=GRID,
        image_token_index=image_token_index, **options,
    )  # fmt: skip
    return t.LlavaNextForConditionalGeneration(config).eval()


def small_onevision():
    import transformers as t

    vision = t.SiglipVisionConfig(**vision_settings(), vision_use_head=False)
    config = t.LlavaOnevisionConfig(
        vision_config=vision, text_config=t.Qwen2Config(**language_settings()),
        image_grid_pinpoints=[[28, 28], [56, 28], [56, 56]],
        image_token_index=63, video_token_index=62,
    )  # fmt: skip
    return t.LlavaOnevisionForConditionalGeneration(config).eval()


@torch.no_grad()
def features(model, pixels, sizes):
    return torch.cat(list(model.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output))


def tiled(n_tiles):
    """Two images cut into 1 + 2 and 1 + 4 tiles, as the processors give them."""
    pixels = torch.randn(2, 5, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return pixels, torch.tensor([[28, 56], [56, 56]])


@pytest.mark.parametrize(("build", "last_read"), [(small_next, 2), (small_onevision, 3)])
def test_tiles_of_an_image_are_edited_alike(build, last_read):
    torch.manual_seed(0)
    model, sae = build(), random_sae(32)
    pixels, sizes = tiled(5)
    if build is small_onevision:
        sizes = torch.tensor([[56, 28], [56, 56]])
    x = residual(model, partial(features, model, pixels, sizes), layer=last_read)
    assert x.shape[0] == 8  # 3 and 5 tiles
    with steer_rows(model, sae, last_read, [[clamp(5, ALPHA)], [clamp(6, ALPHA)]], tiles=[3, 5]):
        steered = residual(model, partial(features, model, pixels, sizes), layer=last_read)
        changed = features(model, pixels, sizes)
    everywhere = torch.ones(x.shape[:2], dtype=torch.bool)
    for rows, latent in ((slice(0, 3), 5), (slice(3, 8), 6)):
        expected = by_hand(sae, x[rows], assigned(latent, lambda z: ALPHA), everywhere[rows], "drop")
        torch.testing.assert_close(steered[rows], expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(changed, features(model, pixels, sizes))
    if last_read == 2:
        with pytest.raises(ValueError, match=r"^layer: 3 changes nothing"), steer(model, sae, 3):
            pass


def test_onevision_has_no_cls_token():
    message = "^tokens: cls, but the vision tower of LlavaOnevisionForConditionalGeneration has no CLS token$"
    with pytest.raises(ValueError, match=message), steer(small_onevision(), random_sae(32), 1, tokens="cls"):
        pass


@pytest.mark.parametrize(("chosen", "read"), [(-2, {2}), (-1, {3}), (3, {2}), ([1, -2], {0, 2}), ([0, -5], {-1})])
def test_which_blocks_are_read(chosen, read):
    """As transformers counts hidden states: number 0 is the embeddings, one more than blocks in all."""
    torch.manual_seed(0)
    model = small_next(vision_feature_layer=chosen)
    assert blocks_read(model, 4) == read
    pixels, sizes = tiled(5)
    before, changed = features(model, pixels, sizes), set()
    for layer, block in enumerate(find_anatomy(model).blocks):
        handle = block.register_forward_hook(lambda module, args, output: output * 2, prepend=True)
        if not torch.equal(features(model, pixels, sizes), before):
            changed.add(layer)
        handle.remove()
    assert changed == set(range(max(read) + 1))


@pytest.mark.parametrize(
    "family", ["CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel", "SiglipVisionModel", "open_clip"]
)
@torch.no_grad()
def test_towers_without_a_language_model(family):
    torch.manual_seed(0)
    if family == "open_clip":
        import open_clip

        model = open_clip.transformer.VisionTransformer(
            image_size=28, patch_size=14, width=32, layers=4, heads=2, mlp_ratio=2.0, output_dim=16
        ).eval()
        run = lambda: model(pixels)  # noqa: E731
    else:
        import transformers as t

        kind = "CLIP" if "CLIP" in family else "Siglip"
        vision = getattr(t, f"{kind}VisionConfig")(**vision_settings())
        text = {k: v for k, v in language_settings().items() if k != "num_key_value_heads"}
        text |= {"max_position_embeddings": 8}
        config = (
            vision
            if "Vision" in family
            else getattr(t, f"{kind}Config")(text_config=text, vision_config=vision.to_dict())
        )
        model = getattr(t, family)(config).eval()
        if "Vision" in family:
            run = lambda: model(pixels).pooler_output if "WithP" not in family else model(pixels).image_embeds  # noqa: E731
        else:
            run = lambda: model.get_image_features(pixel_values=pixels).pooler_output  # noqa: E731
    pixels, sae = torch.randn(2, 3, 28, 28), random_sae(32)
    before, x = run(), residual(model, run)
    with steer(model, sae, LAYER, [clamp(5, ALPHA)], tokens="patches"):
        steered, embedded = residual(model, run), run()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[:, : find_anatomy(model).n_prefix] = False
    assert int(mask.sum()) == 2 * 4
    expected = by_hand(sae, x, assigned(5, lambda z: ALPHA), mask, "drop")
    torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(embedded, before)
    assert torch.equal(run(), before)


@torch.no_grad()
def test_the_tower_of_llava_1_5_in_its_true_shape():
    """CLIP-L/14-336 at layer 22, of which the projector reads the output; the language model is small.

    Blocks 1 to 20 are there, but hand on what they are given: their arithmetic would be most of this test's time.
    """
    import transformers as t

    vision = t.CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
                                image_size=336, patch_size=14, projection_dim=768)  # fmt: skip
    with torch.device("meta"):
        config = t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**language_settings()))
        model = t.LlavaForConditionalGeneration(config)
    model = model.to_empty(device="cpu").eval()
    first, *others = model.model.vision_tower.encoder.layers
    for block in others:  # equal weights in all blocks: random ones for each would take longer than the test
        block.load_state_dict(first.state_dict(), assign=True)
    for block in others[:20]:
        block.forward = lambda x, *args, **kwargs: x
    for parameter in {parameter.data_ptr(): parameter for parameter in model.parameters()}.values():
        parameter.uniform_(-0.02, 0.02)
    model.model.vision_tower.embeddings.position_ids.copy_(torch.arange(577))
    pixels, sae = torch.randn(1, 3, 336, 336), random_sae(1024, d_sae=2048)
    run = lambda: model.get_image_features(pixel_values=pixels).pooler_output[0]  # noqa: E731
    block, untouched, read = find_anatomy(model).blocks[22], [], []
    with steer(model, sae, 22, [clamp(5, 100.0)]):
        # A hook before the steering's own keeps what it is given.
        block.register_forward_hook(lambda module, args, output: untouched.append(output), prepend=True)
        steered = residual(model, lambda: read.append(run()), layer=22)
    (x,) = untouched
    assert x.shape == (1, 577, 1024)
    expected = by_hand(sae, x, assigned(5, lambda z: 100.0), torch.ones(1, 577, dtype=torch.bool), "drop")
    torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(read[0], model.model.multi_modal_projector(expected[0, 1:]), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="layer: 23 changes nothing, the language model reads vision blocks up to 22"):
        steer(model, sae, 23).__enter__()


# --- answers ---------------------------------------------------------------------------------------------------------


def one_at_a_time(llava, picture, row_edits, layer, **options):
    text = llava_processor().apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}], add_generation_prompt=True
    )
    inputs = llava_processor()(text=[text], images=[picture], return_tensors="pt")
    if row_edits is None:
        tokens = llava.generate(**inputs, max_new_tokens=5, do_sample=False)
    else:
        if not row_edits:  # () is the identity control
            options = {**options, "only": False}
        with steer(llava, random_sae(), layer, row_edits, **options):
            tokens = llava.generate(**inputs, max_new_tokens=5, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return llava_processor().batch_decode(new, skip_special_tokens=True)[0].strip()


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
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token=image_token,
    )  # fmt: skip
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
    torch.testing.assert_close(answerer.mean_residual(pictures[0], PROMPT), x_TD[1:].mean(0))


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
