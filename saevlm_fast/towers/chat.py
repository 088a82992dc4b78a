"""What a LLaVA reads: its own chat template around an image and a text, and its own processor on both."""

from typing import Any

from torch import Tensor

from saevlm_fast.errors import first_line, require


def placeholders(processor: Any) -> list[str]:
    """The texts that stand for an image in a prompt: one of most processors; Gemma 3's template has one of its own."""
    names = (getattr(processor, name, None) for name in ("image_token", "boi_token"))
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def chat_text(processor: Any, prompt: str, answer: str | None = None) -> str:
    """The prompt, and an answer if there is one, in the processor's chat template, with one image.

    Most templates take a list of an image and a text, some one string that holds the image token. A prompt that holds
    the image token itself is taken as it is. ValueError: no template, or none that can be used.
    """
    images = placeholders(processor)
    image_token, template = images[0] if images else "<image>", getattr(processor, "chat_template", None)
    if any(token in prompt for token in images):
        return prompt if answer is None else prompt + answer
    require(template is not None, f"prompt: the processor has no chat template, so {prompt!r} must hold {image_token}")
    problem = "it renders no image token"
    parts = [{"type": "image"}, {"type": "text", "text": prompt}]
    forms: tuple[tuple[Any, Any], ...] = (
        (parts, [{"type": "text", "text": answer}]),
        (f"{image_token}\n{prompt}", answer),
    )
    for content, said in forms:
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        messages += [] if answer is None else [{"role": "assistant", "content": said}]
        try:
            text = processor.apply_chat_template(messages, add_generation_prompt=answer is None)
        except Exception as error:  # of jinja2, or whatever a template's own code ends in
            problem = first_line(error)
            continue
        one = sum(text.count(token) for token in images) == 1
        if one and prompt.strip() in text and (answer or "").strip() in text:
            return text
    raise ValueError(
        f"prompt: the processor's chat template cannot be used ({problem}); a prompt may hold {image_token} itself, "
        "and is then taken as it is"
    )


def read_one(processor: Any, image: Any, text: str) -> dict[str, Tensor]:
    """The processor's tensors of one image and one text, on the host: a row of each.

    As apply_chat_template(tokenize=True) does: a template that begins a text itself begins it alone.
    """
    bos = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    features = processor(images=[image], text=[text], return_tensors="pt", **options)
    return {name: value for name, value in features.items() if isinstance(value, Tensor)}
