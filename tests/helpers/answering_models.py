"""One small model of every family that answers questions about images, with random weights, and its processor."""

from collections.abc import Callable
from typing import Any

import torch
from many_towers import qwen_processor, square
from tower_makers import PATCH, RATIOS, SIZE, SIZES, SMALL, WIDTH

from saevlm_fast.box_making.architecture import build_tokenizer

TEMPLATE = (
    "{% for message in messages %}user: {% for part in message['content'] if part['type'] == 'image' %}IMAGE "
    "{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
    "assistant:{% endfor %}"
)
HIDDEN = 48  # of the language model: not the tower's width


def tokenizer(*special: str, **named: str) -> Any:
    """Of whole words, with more special tokens; named: as attributes, such as image_token."""
    from transformers import PreTrainedTokenizerFast

    plain = build_tokenizer(ends=False)
    names = {f"{kind}_token": getattr(plain, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")}
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        padding_side="left",
        model_max_length=512,
        **names,
        extra_special_tokens=named,
    )
    made.add_special_tokens({"additional_special_tokens": ["<image>", *special, *named.values()]})
    return made


def text(words: Any, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": len(words),
        "max_position_embeddings": 512,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "tie_word_embeddings": False,
        **more,
    }


def randomised(model: Any) -> Any:
    """Strong enough that what the tower sees reaches the answer."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
        elif "gate" in name:  # Mllama's are 0 before training
            torch.nn.init.constant_(parameter, 0.7)
    return model.eval().requires_grad_(False)


def llava_next(t: Any) -> tuple[Any, Any]:
    words = tokenizer()
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**SMALL | {"num_hidden_layers": 3}),
        text_config=t.LlamaConfig(**text(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_grid_pinpoints=[[SIZE, 2 * SIZE]],
    )
    images = t.LlavaNextImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_grid_pinpoints=[[SIZE, 2 * SIZE]]
    )
    processor = t.LlavaNextProcessor(
        images, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return t.LlavaNextForConditionalGeneration(config), processor


def pixtral(t: Any) -> tuple[Any, Any]:
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    vision = t.PixtralVisionConfig(**SIZES, image_size=64, patch_size=PATCH)
    config = t.LlavaConfig(
        vision_config=vision,
        text_config=t.LlamaConfig(**text(words)),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
    )
    images = t.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": PATCH, "width": PATCH})
    return t.LlavaForConditionalGeneration(config), t.PixtralProcessor(images, words, patch_size=PATCH)


def mistral3(t: Any) -> tuple[Any, Any]:
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    vision = t.PixtralVisionConfig(**SIZES, image_size=64, patch_size=PATCH)
    config = t.Mistral3Config(
        vision_config=vision,
        text_config=t.MistralConfig(**text(words)),
        spatial_merge_size=2,
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
    )
    images = t.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 2 * PATCH, "width": 2 * PATCH})
    processor = t.PixtralProcessor(images, words, patch_size=PATCH, spatial_merge_size=2)
    return t.Mistral3ForConditionalGeneration(config), processor


QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen(name: str, **vision: Any) -> Callable[[Any], tuple[Any, Any]]:
    def make(t: Any) -> tuple[Any, Any]:
        words = tokenizer(*QWEN_TOKENS)
        ids = dict(zip(("vision_start", "vision_end", "image", "video"), map(words.convert_tokens_to_ids, QWEN_TOKENS)))
        ids = {f"{key}_token_id": value for key, value in ids.items()}
        rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
        common = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "intermediate_size": 48}
        config = getattr(t, f"{name}Config")(
            vision_config=common | vision, text_config=text(words, rope_parameters=rope), **ids
        )
        model = getattr(t, f"{name}ForConditionalGeneration")(config)
        processor = getattr(t, f"{name}Processor")
        video = getattr(t, "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor")
        return model, processor(qwen_processor(t), words, video(patch_size=PATCH, merge_size=2))

    return make


def internvl(t: Any) -> tuple[Any, Any]:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer(**named, video_token="<video>")
    vision = t.InternVLVisionConfig(**SIZES, image_size=[SIZE, SIZE], patch_size=[PATCH, PATCH])
    config = t.InternVLConfig(
        vision_config=vision,
        text_config=t.Qwen2Config(**text(words)),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = square(t, "GotOcr2ImageProcessor", crop_to_patches=False)
    processor = t.InternVLProcessor(images, words, t.InternVLVideoProcessor(), image_seq_length=4)
    return t.InternVLForConditionalGeneration(config), processor


def paligemma(t: Any) -> tuple[Any, Any]:
    words = tokenizer()
    vision = t.SiglipVisionConfig(**SMALL, vision_use_head=False, projection_dim=HIDDEN)
    images = square(t, "SiglipImageProcessor")
    images.image_seq_length = 16
    processor = t.PaliGemmaProcessor(images, words)
    config = t.PaliGemmaConfig(
        vision_config=vision,
        text_config=t.GemmaConfig(**text(words) | {"vocab_size": len(words)}),
        image_token_index=processor.image_token_id,
        projection_dim=HIDDEN,
    )
    return t.PaliGemmaForConditionalGeneration(config), processor


def gemma3(t: Any) -> tuple[Any, Any]:
    words = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    vision = t.SiglipVisionConfig(**SMALL, vision_use_head=False)
    config = t.Gemma3Config(
        vision_config=vision,
        text_config=t.Gemma3TextConfig(**text(words), sliding_window=64),
        mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )
    images = square(t, "Gemma3ImageProcessor")
    return t.Gemma3ForConditionalGeneration(config), t.Gemma3Processor(images, words, image_seq_length=4)


def idefics(name: str) -> Callable[[Any], tuple[Any, Any]]:
    def make(t: Any) -> tuple[Any, Any]:
        words = tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>")
        edge = {"longest_edge": SIZE}
        images = getattr(t, f"{name}ImageProcessor")(size=edge, max_image_size=edge)
        processor_class = getattr(t, f"{name}Processor")
        if name == "SmolVLM":  # which wants a package that spells numbers, for videos alone
            from transformers.models.smolvlm import processing_smolvlm

            processing_smolvlm.num2words = processing_smolvlm.num2words or str
        more = (t.SmolVLMVideoProcessor(size=edge),) if name == "SmolVLM" else ()
        processor = processor_class(images, words, *more, image_seq_len=4)
        config = getattr(t, f"{name}Config")(
            vision_config=SMALL,
            text_config=t.LlamaConfig(**text(words)),
            scale_factor=2,
            image_token_id=words.convert_tokens_to_ids("<image>"),
            pad_token_id=words.pad_token_id,
        )
        return getattr(t, f"{name}ForConditionalGeneration")(config), processor

    return make


def mllama(t: Any) -> tuple[Any, Any]:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    words = tokenizer("<|image|>", "<|python_tag|>")
    vision = MllamaVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        max_num_tiles=4,
        intermediate_layers_indices=[0],
        vision_output_dim=2 * WIDTH,
        supported_aspect_ratios=RATIOS,
    )
    settings = text(words, cross_attention_layers=[1])
    language = MllamaTextConfig(**settings)
    config = t.MllamaConfig(
        vision_config=vision, text_config=language, image_token_index=words.convert_tokens_to_ids("<|image|>")
    )
    images = square(t, "MllamaImageProcessor", max_image_tiles=4)
    return t.MllamaForConditionalGeneration(config), t.MllamaProcessor(images, words)


def perception_lm(t: Any) -> tuple[Any, Any]:
    words = tokenizer(image_token="<|image|>", video_token="<|video|>")
    trunk = {
        "embed_dim": WIDTH,
        "depth": 2,
        "num_heads": 2,
        "img_size": SIZE,
        "patch_size": PATCH,
        "global_pool": "",
        "use_post_transformer_norm": False,
    }
    vision = t.TimmWrapperConfig(architecture="vit_pe_core_tiny_patch16_384", model_args=trunk, do_pooling=False)
    vision.num_features = WIDTH
    config = t.PerceptionLMConfig(
        vision_config=vision,
        text_config=t.LlamaConfig(**text(words)),
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
    )
    images = t.PerceptionLMImageProcessor(
        tile_size=SIZE, max_num_tiles=1, vision_input_type="vanilla", size={"height": SIZE, "width": SIZE}
    )
    processor = t.PerceptionLMProcessor(
        t.PerceptionLMVideoProcessor(), images, words, patch_size=PATCH, pooling_ratio=1
    )
    return t.PerceptionLMForConditionalGeneration(config), processor


MODELS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "LLaVA-NeXT": llava_next,
    "LLaVA with Pixtral": pixtral,
    "Mistral3": mistral3,
    "Qwen2-VL": qwen("Qwen2VL", embed_dim=WIDTH, hidden_size=HIDDEN, mlp_ratio=2),
    "Qwen2.5-VL": qwen(
        "Qwen2_5_VL", hidden_size=WIDTH, out_hidden_size=HIDDEN, window_size=32, fullatt_block_indexes=[1]
    ),
    "Qwen3-VL": qwen(
        "Qwen3VL", hidden_size=WIDTH, out_hidden_size=HIDDEN, deepstack_visual_indexes=[0], num_position_embeddings=16
    ),
    "InternVL": internvl,
    "PaliGemma": paligemma,
    "Gemma 3": gemma3,
    "Idefics3": idefics("Idefics3"),
    "SmolVLM": idefics("SmolVLM"),
    "Mllama": mllama,
    "PerceptionLM": perception_lm,
}


def make(name: str) -> tuple[Any, Any]:
    import transformers as t

    torch.manual_seed(0)
    model, processor = MODELS[name](t)
    token = getattr(processor, "image_token", "<image>")
    processor.chat_template = None if name == "PaliGemma" else TEMPLATE.replace("IMAGE", token)
    return randomised(model), processor
