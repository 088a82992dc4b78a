"""Text encoders against the libraries' own models, and what they refuse."""

import pytest
import torch

from saevlm_fast.demo.ground_truth import scene_words
from saevlm_fast.towers.text import load_text_encoder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """tiny-clip with random weights, and its directory."""
    from saevlm_fast.box_making.architecture import build_clip, clip_processor

    torch.manual_seed(0)
    model = build_clip().eval()
    directory = tmp_path_factory.mktemp("clip")
    model.save_pretrained(directory)
    clip_processor().save_pretrained(directory)
    return model, directory


@torch.inference_mode()
def test_embeddings_are_the_models_own_alone_and_in_batches(clip):
    from transformers import AutoTokenizer

    model, directory = clip
    texts = scene_words().texts[:20]
    encoder = load_text_encoder(f"hf:{directory}")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    expected = [model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output for text in texts]
    expected_ME = torch.nn.functional.normalize(torch.cat(expected), dim=1)
    for batch_size in (256, 3, 1):
        torch.testing.assert_close(encoder.embed(texts, batch_size), expected_ME, rtol=1e-4, atol=1e-6)
    assert encoder.d == 128
    assert encoder.embed([]).shape == (0, 128)


def test_one_by_one_an_embedding_is_the_same_whatever_the_others_are(clip):
    encoder, texts = load_text_encoder(f"hf:{clip[1]}"), scene_words().texts[:9]
    together = encoder.embed(texts, batch_size=1)
    assert torch.equal(encoder.embed(texts[::-1], batch_size=1).flip(0), together)
    assert all(torch.equal(encoder.embed([text], batch_size=1)[0], row) for text, row in zip(texts, together))


@torch.inference_mode()
def test_siglip_reads_texts_padded_to_the_full_length(tmp_path):
    """Its state is the last token's, padding or not; no mask."""
    import transformers as t

    from saevlm_fast.box_making.architecture import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(ends=True)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **shape,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 9,
        "projection_size": 32,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config={**shape, "image_size": 28, "patch_size": 14}))
    torch.nn.init.normal_(model.eval().text_model.embeddings.token_embedding.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer(["a star", "a red thing"], padding="max_length", max_length=9, return_tensors="pt")["input_ids"]
    expected = torch.nn.functional.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=1)
    encoder = load_text_encoder(f"hf:{tmp_path}")
    torch.testing.assert_close(encoder.embed(["a star", "a red thing"]), expected, rtol=1e-4, atol=1e-6)
    assert (encoder.d, encoder.max_tokens) == (32, 9)
    with pytest.raises(ValueError, match=r"^texts: 'a red thing a red .*' has 11 tokens, hf:.* takes at most 9$"):
        encoder.embed(["a red thing " * 3])


@torch.inference_mode()
def test_metaclip_2(tmp_path):
    """Its tokenizers have an unknown word, and pad with another token than they end with."""
    import transformers as t

    from saevlm_fast.box_making.architecture import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(ends=True)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**shape, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 9}
    vision = {**shape, "image_size": 28, "patch_size": 14}
    model = t.MetaClip2Model(t.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=24)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder, texts = load_text_encoder(f"hf:{tmp_path}"), ["a star", "a red thing", "red"]
    expected = [model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output for text in texts]
    expected_ME = torch.nn.functional.normalize(torch.cat(expected), dim=1)
    torch.testing.assert_close(encoder.embed(texts), expected_ME, rtol=1e-4, atol=1e-6)
    assert (encoder.d, encoder.max_tokens) == (24, 9)
    with pytest.raises(ValueError, match=r"^texts: 'a zebra' has a word that hf:.* does not know$"):
        encoder.embed(["a zebra"])


@torch.inference_mode()
def test_open_clip(tmp_path, monkeypatch):
    import open_clip
    from safetensors.torch import save_file

    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS,
        "small",
        {
            "embed_dim": 24,
            "vision_cfg": {"image_size": 28, "layers": 1, "width": 64, "patch_size": 14},
            "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        },
    )
    torch.manual_seed(0)
    model = open_clip.create_model("small").eval()
    save_file(model.state_dict(), tmp_path / "small.safetensors")
    encoder = load_text_encoder(f"open_clip:small/{tmp_path / 'small.safetensors'}")
    texts = ["a dog", "A zebra, at night"]
    tokens = open_clip.get_tokenizer("small")(texts)
    expected = torch.nn.functional.normalize(model.encode_text(tokens), dim=1)
    torch.testing.assert_close(encoder.embed(texts), expected, rtol=1e-4, atol=1e-6)
    assert (encoder.d, encoder.max_tokens) == (24, 8)
    with pytest.raises(ValueError, match=r"^texts: 'one two three four five six seven' has 9 tokens, open_clip:.* 8$"):
        encoder.embed(["one two three four five six seven"])
    cut = encoder.embed(["one two three four five six seven", "one two three four five six"], refuse=False)
    assert torch.equal(cut[0], cut[1])


def test_what_would_be_misread_is_refused_unless_it_is_what_a_model_answered(clip):
    encoder = load_text_encoder(f"hf:{clip[1]}")
    long = "a star " * 50
    with pytest.raises(ValueError, match=r"^texts: 'a zebra' has a word that hf:.* does not know$"):
        encoder.embed(["a star", "a zebra"])
    with pytest.raises(ValueError, match=r"^texts: 'a star a star.*' has 102 tokens, hf:.* takes at most 40$"):
        encoder.embed([long])
    zebra, gnu, cut, full, empty = encoder.embed(["a zebra", "a gnu", long, "a star " * 19, ""], refuse=False)
    assert torch.equal(zebra, gnu)  # both an unknown word
    torch.testing.assert_close(cut, full, rtol=1e-5, atol=1e-6)
    assert empty.isfinite().all()


def test_refuses_what_is_no_whole_text_side(clip, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig

    from tiny_tower import save_clip

    no_tokenizer = save_clip(tmp_path / "no_tokenizer")
    ViTConfig().save_pretrained(tmp_path / "vit")
    partial = tmp_path / "partial"
    partial.mkdir()
    for file in clip[1].iterdir():
        (partial / file.name).write_bytes(file.read_bytes())
    weights = load_file(partial / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    for spec, message in (
        ("timm:vit", "is not hf:NAME_OR_DIR or open_clip:"),
        (f"hf:{tmp_path / 'none'}", "no directory"),
        (f"hf:{tmp_path}", "config.json is missing"),
        (f"hf:{tmp_path / 'vit'}", "a vit model has no text side"),
        (f"hf:{no_tokenizer}", "its tokenizer has 2 tokens, its text tower 50"),
        (f"hf:{partial}", "1 weights are missing, as text_projection.weight"),
        ("open_clip:none/x", "open_clip has no architecture none"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_text_encoder(spec)
        assert "\n" not in str(caught.value)
        assert spec in str(caught.value)
