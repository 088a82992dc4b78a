"""tiny-clip and tiny-llava before training: configurations, tokenizer and processors, in transformers layout.

Everything is built from transformers' own classes and saved by its own save_pretrained, so the results load through
the code path of the real CLIP and LLaVA.
"""

from typing import Any

import torch

from saevlm_fast.box.scenes import IMAGE_SIZE
from saevlm_fast.box_making.language import BOS, CHAT, EOS, IMAGE, PAD, UNKNOWN, vocabulary

PATCH_SIZE = 8
N_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
PIXEL_MEAN, PIXEL_STD = (0.5, 0.5, 0.5), (0.27, 0.27, 0.27)
MAX_TOKENS = 40  # the longest description has 35 with its two special tokens
_WIDTH = 128


def build_tokenizer(ends: bool) -> Any:
    """A fast tokenizer of whole words, lower case; `ends` puts <eos> behind every text (CLIP reads its state there)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(BOS, words[BOS]), (EOS, words[EOS])]
    single = f"{BOS} $A {EOS}" if ends else f"{BOS} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        model_max_length=MAX_TOKENS if ends else 512,
        padding_side="right" if ends else "left",  # a batch of answers begins where its questions end
    )


def image_processor() -> Any:
    """Scenes as they are; other images are scaled and cropped to IMAGE_SIZE."""
    from transformers import CLIPImageProcessor

    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=list(PIXEL_MEAN), image_std=list(PIXEL_STD)
    )


def clip_processor() -> Any:
    from transformers import CLIPProcessor

    return CLIPProcessor(image_processor(), build_tokenizer(ends=True))


def build_clip(attention: str = "sdpa") -> Any:
    """A CLIPModel with weights drawn from torch's generator: 5 vision blocks, 2 text blocks, width 128."""
    from transformers import CLIPConfig, CLIPModel

    words = vocabulary()
    shared = {
        "hidden_size": _WIDTH,
        "intermediate_size": 4 * _WIDTH,
        "num_attention_heads": 4,
        "projection_dim": _WIDTH,
    }
    vision = {**shared, "num_hidden_layers": 5, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    text = {**shared, "num_hidden_layers": 2, "vocab_size": len(words), "max_position_embeddings": MAX_TOKENS}
    text |= {f"{name}_token_id": words.index(token) for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS))}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=_WIDTH)
    model: Any = CLIPModel._from_config(config, attn_implementation=attention)
    # As strong as the patches they are added to; with transformers' own 0.02 places were learned three times slower.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.2)
    return model


def llava_processor() -> Any:
    from transformers import LlavaProcessor

    before, after = CHAT.split("{question}")
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        + before.split(IMAGE)[0]
        + "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
        + "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        + after
        + "{% else %} {% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        + "<eos> {% endif %}{% endfor %}"
    )
    return LlavaProcessor(
        image_processor(),
        build_tokenizer(ends=False),
        patch_size=PATCH_SIZE,
        image_token=IMAGE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def build_llava(clip: Any, attention: str = "sdpa") -> Any:
    """A LlavaForConditionalGeneration around clip's vision tower (copied, frozen) with a new projector and Llama."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    words = vocabulary()
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        intermediate_size=3 * _WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=words.index(PAD),
        bos_token_id=words.index(BOS),
        eos_token_id=words.index(EOS),
    )
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=text,
        image_token_index=words.index(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=N_PATCHES,
        tie_word_embeddings=False,
    )
    llava = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    tower = llava.model.vision_tower
    tower.load_state_dict(
        {name: tensor.clone() for name, tensor in clip.vision_model.state_dict().items()}, strict=False
    )
    tower.requires_grad_(False)
    return llava
