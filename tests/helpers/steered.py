"""Small models that are steered, random and identity SAEs of them, and what an edit should give."""

import torch

from saevlm_fast.box_making.architecture import llava_processor
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.edits import steer
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


def vision_settings(**more):
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "image_size": 28,
        "patch_size": 14,
        **more,
    }


def language_settings():
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


GRID = [[28, 56], [56, 28], [56, 56]]


def small_next(image_token_index=63, vocab_size=64, **options):
    import transformers as t

    text = t.LlamaConfig(**(language_settings() | {"vocab_size": vocab_size}))
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**vision_settings()),
        text_config=text,
        image_grid_pinpoints=GRID,
        image_token_index=image_token_index,
        **options,
    )
    return t.LlavaNextForConditionalGeneration(config).eval()


def small_onevision():
    import transformers as t

    vision = t.SiglipVisionConfig(**vision_settings(), vision_use_head=False)
    config = t.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=t.Qwen2Config(**language_settings()),
        image_grid_pinpoints=[[28, 28], [56, 28], [56, 56]],
        image_token_index=63,
        video_token_index=62,
    )
    return t.LlavaOnevisionForConditionalGeneration(config).eval()


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
