"""Models that read images and text, of every family, at a tiny width with random weights: (model, processor)."""

from collections.abc import Callable
from typing import Any

import torch

WORDS = "a two things red blue square circle and on the of to user : assistant what is it ? describe image .".split()
WIDTH, LAYERS, IMAGE = 16, 2, 32


def tokenizer(*special: str, **names: str) -> Any:
    """Whole words behind <bos>; special tokens are one token each. names: extra ones the processor asks for by name."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    first = ["<pad>", "<unk>", "<bos>", "<eos>", *dict.fromkeys([*special, *names.values()])]
    words = {word: i for i, word in enumerate([*first, *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(first)
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        **({"extra_special_tokens": names} if names else {"additional_special_tokens": first[4:]}),
        padding_side="left",
        model_max_length=4096,
    )


def template(image: str) -> str:
    return (
        "{% for m in messages %}{{ m.role }} : {% for p in m.content %}{% if p.type == 'image' %}"
        + image
        + "{% else %} {{ p.text }} {% endif %}{% endfor %}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %} assistant : {% endif %}"
    )


def text_config(kind: str, words: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": words,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "tie_word_embeddings": False,
    } | more


def vision_config(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": 8,
        "projection_dim": 8,
    } | more


def _clip_images(**more: Any) -> dict[str, Any]:
    return {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}} | more


def llava(name: str = "Llava") -> tuple[Any, Any]:
    import transformers as t

    words = tokenizer("<image>")
    vision = vision_config("clip_vision_model")
    text = text_config("llama", len(words))
    if name == "Llava":
        config: Any = t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
        images: Any = t.CLIPImageProcessor(**_clip_images())
    else:
        pinpoints = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]
        config = t.LlavaNextConfig(
            vision_config=vision, text_config=text, image_token_index=4, image_grid_pinpoints=pinpoints
        )
        images = t.LlavaNextImageProcessor(**_clip_images(image_grid_pinpoints=pinpoints))
    processor = getattr(t, f"{name}Processor")(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    return getattr(t, f"{name}ForConditionalGeneration")(config), processor


def llava_next() -> tuple[Any, Any]:
    return llava("LlavaNext")


def llava_onevision() -> tuple[Any, Any]:
    import transformers as t

    words = tokenizer("<image>", "<video>")
    pinpoints = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]
    config = t.LlavaOnevisionConfig(
        vision_config=vision_config("siglip_vision_model", vision_use_head=False),
        text_config=text_config("qwen2", len(words)),
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=pinpoints,
    )
    images = t.LlavaOnevisionImageProcessor(size={"height": IMAGE, "width": IMAGE}, image_grid_pinpoints=pinpoints)
    processor = t.LlavaOnevisionProcessor(
        images,
        words,
        t.LlavaOnevisionVideoProcessor(),
        num_image_tokens=(IMAGE // 8) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )
    return t.LlavaOnevisionForConditionalGeneration(config), processor


def pixtral() -> tuple[Any, Any]:
    import transformers as t

    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    vision = vision_config("pixtral", patch_size=8, head_dim=8)
    config = t.LlavaConfig(
        vision_config=vision,
        text_config=text_config("mistral", len(words)),
        image_token_index=4,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    images = t.PixtralImageProcessor(size={"longest_edge": IMAGE}, patch_size={"height": 8, "width": 8})
    processor = t.PixtralProcessor(images, words, patch_size=8, chat_template=template("[IMG]"))
    return t.LlavaForConditionalGeneration(config), processor


def mistral3() -> tuple[Any, Any]:
    import transformers as t

    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = t.Mistral3Config(
        vision_config=vision_config("pixtral", patch_size=8, head_dim=8),
        text_config=text_config("mistral", len(words)),
        image_token_index=4,
        spatial_merge_size=2,
    )
    images = t.PixtralImageProcessor(size={"longest_edge": IMAGE}, patch_size={"height": 16, "width": 16})
    processor = t.PixtralProcessor(images, words, patch_size=8, spatial_merge_size=2, chat_template=template("[IMG]"))
    return t.Mistral3ForConditionalGeneration(config), processor


def qwen(name: str) -> tuple[Any, Any]:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""
    import transformers as t

    words = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}
    if name == "Qwen2VL":
        vision |= {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}
    elif name == "Qwen2_5_VL":
        vision |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": WIDTH, "window_size": 32}
        vision |= {"fullatt_block_indexes": [1]}
    else:
        vision |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": WIDTH, "num_position_embeddings": 64}
        vision |= {"deepstack_visual_indexes": [0]}
    text = text_config("", len(words))
    del text["model_type"]
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = getattr(t, f"{name}Config")(
        vision_config=vision,
        text_config=text,
        image_token_id=6,
        video_token_id=7,
        vision_start_token_id=4,
        vision_end_token_id=5,
    )
    images = t.Qwen2VLImageProcessor(
        patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=IMAGE * IMAGE, temporal_patch_size=2
    )
    kind = "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor"
    processor = getattr(t, f"{name}Processor")(
        images,
        words,
        getattr(t, kind)(),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return getattr(t, f"{name}ForConditionalGeneration")(config), processor


def internvl() -> tuple[Any, Any]:
    import transformers as t

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer("<IMG_CONTEXT>", **names)
    config = t.InternVLConfig(
        vision_config=vision_config("internvl_vision", image_size=[IMAGE, IMAGE], patch_size=[8, 8]),
        text_config=text_config("qwen2", len(words)),
        image_token_id=4,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = t.GotOcr2ImageProcessor(size={"height": IMAGE, "width": IMAGE}, max_patches=3, crop_to_patches=True)
    processor = t.InternVLProcessor(
        images,
        words,
        t.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )
    return t.InternVLForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    import transformers as t

    images = t.SiglipImageProcessor(size={"height": IMAGE, "width": IMAGE})
    images.image_seq_length = 16
    processor = t.PaliGemmaProcessor(images, tokenizer("<image>", "\n", image_token="<image>"))
    config = t.PaliGemmaConfig(
        vision_config=vision_config("siglip_vision_model", vision_use_head=False, projection_dim=WIDTH),
        text_config=text_config("gemma", len(processor.tokenizer)),
        image_token_index=4,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return t.PaliGemmaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    import transformers as t

    names = {"image_token": "<soft>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(**names)
    config = t.Gemma3Config(
        vision_config=vision_config("siglip_vision_model", vision_use_head=False),
        text_config=text_config(
            "gemma3_text", len(words), sliding_window=16, layer_types=["sliding_attention", "full_attention"]
        ),
        image_token_index=4,
        boi_token_index=5,
        eoi_token_index=6,
        mm_tokens_per_image=4,
    )
    images = t.Gemma3ImageProcessor(size={"height": IMAGE, "width": IMAGE})
    processor = t.Gemma3Processor(images, words, image_seq_length=4, chat_template=template("<start_of_image>"))
    return t.Gemma3ForConditionalGeneration(config), processor


def idefics3(name: str = "Idefics3") -> tuple[Any, Any]:
    import transformers as t

    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    names = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows)
    extra = {"image_token": "<image>", "fake_image_token": names[1], "end_of_utterance_token": names[2]}
    words = tokenizer(*names, **(extra | {"global_image_token": names[3]} if name == "SmolVLM" else {}))
    kind = "idefics3_vision" if name == "Idefics3" else "smolvlm_vision"
    config = getattr(t, f"{name}Config")(
        vision_config=vision_config(kind),
        text_config=text_config("llama", len(words)),
        image_token_id=4,
        scale_factor=2,
    )
    images = getattr(t, f"{name}ImageProcessor")(
        size={"longest_edge": 2 * IMAGE}, max_image_size={"longest_edge": IMAGE}
    )
    options = {"video_processor": t.SmolVLMVideoProcessor()} if name == "SmolVLM" else {}
    processor = getattr(t, f"{name}Processor")(
        images, words, image_seq_len=4, chat_template=template("<image>"), **options
    )
    return getattr(t, f"{name}ForConditionalGeneration")(config), processor


def aya_vision() -> tuple[Any, Any]:
    import transformers as t

    names = ("<image>", "<img>", "<start>", "<end>", "<line>", "<tile>", "<tile_global>")
    words = tokenizer(*names)
    config = t.AyaVisionConfig(
        vision_config=vision_config("siglip_vision_model", vision_use_head=False),
        text_config=text_config("cohere2", len(words), sliding_window=16),
        image_token_index=5,
        downsample_factor=2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    images = t.GotOcr2ImageProcessor(size={"height": IMAGE, "width": IMAGE}, max_patches=3, crop_to_patches=True)
    processor = t.AyaVisionProcessor(
        images,
        words,
        patch_size=8,
        img_size=IMAGE,
        image_token="<image>",
        downsample_factor=2,
        start_of_img_token="<start>",
        end_of_img_token="<end>",
        img_patch_token="<img>",
        img_line_break_token="<line>",
        tile_token="<tile>",
        tile_global_token="<tile_global>",
        chat_template=template("<image>"),
    )
    return t.AyaVisionForConditionalGeneration(config), processor


def mllama() -> tuple[Any, Any]:
    """Its images reach the language model by cross-attention."""
    import transformers as t

    words = tokenizer("<|image|>", "<|python_tag|>", image_token="<|image|>")
    vision = vision_config("mllama_vision_model", num_global_layers=1, attention_heads=2, max_num_tiles=1)
    vision |= {"vision_output_dim": 32, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text = text_config("mllama_text_model", len(words), num_hidden_layers=3, cross_attention_layers=[1])
    config = t.MllamaConfig(vision_config=vision, text_config=text, image_token_index=4)
    images = t.MllamaImageProcessor(size={"height": IMAGE, "width": IMAGE}, max_image_tiles=1)
    processor = t.MllamaProcessor(images, words, chat_template=template("<|image|>"))
    return t.MllamaForConditionalGeneration(config), processor


def blip2() -> tuple[Any, Any]:
    """Its images are a few query tokens."""
    import transformers as t

    words = tokenizer("<image>")
    config = t.Blip2Config(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE,
            "patch_size": 8,
        },
        qformer_config={
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": WIDTH,
            "vocab_size": len(words),
        },
        text_config={
            "model_type": "opt",
            "vocab_size": len(words),
            "hidden_size": WIDTH,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": WIDTH,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        num_query_tokens=4,
        image_token_index=4,
    )
    images = t.BlipImageProcessor(size={"height": IMAGE, "width": IMAGE})
    processor = t.Blip2Processor(images, words, num_query_tokens=4)
    return t.Blip2ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "qwen2_vl": lambda: qwen("Qwen2VL"),
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VL"),
    "qwen3_vl": lambda: qwen("Qwen3VL"),
    "internvl": internvl,
    "paligemma": paligemma,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "smolvlm": lambda: idefics3("SmolVLM"),
    "aya_vision": aya_vision,
    "blip2": blip2,
}
REFUSED = {"mllama": mllama}


def tiny_vlm(family: str) -> tuple[Any, Any]:
    """The model of a family in eval mode, its weights strong enough for rows to differ."""
    torch.manual_seed(0)
    model, processor = (FAMILIES | REFUSED)[family]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False), processor
