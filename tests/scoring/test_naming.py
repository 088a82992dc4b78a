"""Directions of latents against their definition; words of planted concepts."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted_codes import in_memory, write_codes
from torch import Tensor

from saevlm_fast.cli.name import NameArguments, _told
from saevlm_fast.look.names import Named, Pointed, Words, name_latents
from saevlm_fast.scoring.monosemanticity import streamed_score
from saevlm_fast.scoring.naming import Name, latent_directions, nearest_words, read_words

# --- directions ---


def definition(acts_NS: Tensor, emb_NE: Tensor) -> Tensor:
    """The covariance of activation and unit embedding, scaled to length 1: float64, image by image."""
    acts, unit = acts_NS.double().numpy(), emb_NE.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    covariance = (acts - acts.mean(0)).T @ (unit - unit.mean(0))
    return torch.from_numpy(covariance / np.linalg.norm(covariance, axis=1, keepdims=True))


@pytest.mark.parametrize("offset", [0.0, -3.0, 100.0])
def test_directions_of_neurons_are_covariances_whatever_the_offset(offset):
    generator = torch.Generator().manual_seed(1)
    acts_NS, emb_NE = torch.randn(200, 5, generator=generator) + offset, torch.randn(200, 7, generator=generator) + 1
    directions_SE = latent_directions(streamed_score(in_memory(acts_NS), in_memory(emb_NE), batch_rows=64))
    torch.testing.assert_close(directions_SE, definition(acts_NS, emb_NE), rtol=1e-9, atol=1e-9)


def test_directions_of_codes_and_of_latents_without_one(tmp_path):
    generator = torch.Generator().manual_seed(2)
    acts_NS, emb_NE = torch.randn(40, 6, generator=generator).clamp(min=0), torch.randn(40, 7, generator=generator)
    acts_NS[:, 1], acts_NS[:, 2] = 0.0, 2.0  # dead, constant
    directions_SE = latent_directions(streamed_score(write_codes(tmp_path / "c", acts_NS), in_memory(emb_NE)))
    pointing = [0, 3, 4, 5]
    torch.testing.assert_close(directions_SE[pointing], definition(acts_NS[:, pointing], emb_NE), rtol=1e-9, atol=1e-9)
    assert not directions_SE[[1, 2]].any()


def test_directions_of_equal_embeddings_are_zero():
    scores = streamed_score(in_memory(torch.rand(9, 3)), in_memory(torch.full((9, 4), 0.3)))
    assert not latent_directions(scores).any()


def test_directions_need_cosine_sums():
    scores = streamed_score(in_memory(torch.rand(9, 3)), in_memory(torch.rand(9, 4)), similarity="dot")
    with pytest.raises(ValueError, match=r"^similarity: names need cosine sums, not dot"):
        latent_directions(scores)


# --- words ---


def test_planted_concepts_get_their_words_across_the_modality_gap():
    """Images lie around one far point and texts around another; which concepts an image shows is known."""
    generator = torch.Generator().manual_seed(3)
    concepts_CE = torch.linalg.qr(torch.randn(64, 12, generator=generator)).Q.T
    gaps_2E = 4 * torch.linalg.qr(torch.randn(64, 2, generator=generator)).Q.T
    # The gap of the texts leans to concept 11: without centring the texts, it would be everybody's name.
    shown_NC = (torch.rand(500, 12, generator=generator) < 0.3).float()
    emb_NE = shown_NC @ concepts_CE + gaps_2E[0] + 0.05 * torch.randn(500, 64, generator=generator)
    texts_ME = concepts_CE + gaps_2E[1] + 0.3 * concepts_CE.sum(0)
    acts_NS = shown_NC * (0.5 + torch.rand(500, 12, generator=generator))
    names = nearest_words(
        latent_directions(streamed_score(in_memory(acts_NS), in_memory(emb_NE))), texts_ME, list("abcdefghijkl"), 2
    )
    assert "".join(best.word for best, _ in names) == "abcdefghijkl"
    assert all(best.score > 0.1 > abs(second.score) for best, second in names)


def test_a_score_is_the_cosine_above_that_of_the_average_word():
    directions = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    texts = torch.tensor([[0.0, 2.0], [3.0, 0.0], [5.0, 0.0], [0.6, 0.8]])
    names, nothing = nearest_words(directions, texts, ["up", "right", "also right", "slant"], 9)
    assert nothing == []
    assert [name.word for name in names] == ["right", "also right", "slant", "up"]  # ties in the order of the list
    mean = (0 + 1 + 1 + 0.6) / 4
    assert [name.score for name in names] == pytest.approx([1 - mean, 1 - mean, 0.6 - mean, -mean], abs=1e-7)


def test_blocks_of_latents_give_the_same_names(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    directions, texts = torch.randn(20, 6, generator=generator), torch.randn(9, 6, generator=generator)
    whole = nearest_words(directions, texts, list("abcdefghi"), 3)
    monkeypatch.setattr("saevlm_fast.scoring.naming._SIMILARITIES_AT_ONCE", 30)
    blocks = nearest_words(directions, texts, list("abcdefghi"), 3)
    assert [[name.word for name in names] for names in blocks] == [[name.word for name in names] for names in whole]


def test_nearest_words_refuses_in_one_line():
    directions, texts = torch.ones(2, 3), torch.eye(3)
    for arguments, message in (
        ((directions, texts, ["a", "b", "c"], 0), "n: 0 must"),
        ((directions, texts[:1], ["a"], 1), "words: 1 given; at least 2"),
        ((directions, texts, ["a", "b"], 1), r"texts: shape \[3, 3\] is not \[2, 3\]"),
        ((torch.ones(2, 4), texts, ["a", "b", "c"], 1), r"texts: shape \[3, 3\] is not \[3, 4\]"),
        ((directions, texts * 0, ["a", "b", "c"], 1), "texts: the embedding of 'a' is zero"),
        ((directions, texts.log(), ["a", "b", "c"], 1), "texts: the embedding of 'a' is zero, NaN or infinite"),
    ):
        with pytest.raises(ValueError, match="^" + message):
            nearest_words(*arguments)


def test_embeddings_of_another_width_than_the_texts_are_refused_before_their_words_are_sought():
    sums = streamed_score(in_memory(torch.rand(9, 3)), in_memory(torch.rand(9, 7)))
    pointed = Pointed(torch.zeros(3, 7), torch.zeros(3, 7), sums, torch.zeros(3))
    encoder = SimpleNamespace(spec="hf:clip", embed=lambda texts: torch.zeros(len(texts), 5))
    words = Words(["red", "blue"], ["a red", "a blue"])
    said = r"^embeddings: 7 wide, but texts of hf:clip are 5 wide; .* by the same model \(harvest --point projection\)$"
    with pytest.raises(ValueError, match=said):
        name_latents(pointed, encoder, words, 3)


def test_read_words(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeffdog\n\n  café \r\ndog\n", encoding="utf-8")
    assert read_words(file) == (["dog", "café"], ["a photo of dog", "a photo of café"])
    assert read_words(file, "{}").texts == ["dog", "café"]
    file.write_bytes(b"\xff\xfe\x00")
    for arguments, message in (
        ((file,), "words: .*words.txt cannot be read"),
        ((tmp_path / "none.txt",), "words: .*none.txt cannot be read"),
        ((file, "a photo"), "template: 'a photo' has no {}"),
    ):
        with pytest.raises(ValueError, match=message):
            read_words(*arguments)
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no words"):
        read_words(file)


def test_the_command_says_below_which_score_words_are_no_name(monkeypatch):
    said = []
    monkeypatch.setattr("saevlm_fast.cli.name.say", lambda *lines: said.extend(lines))
    monkeypatch.setattr("saevlm_fast.cli.name.print_table", lambda *given, **more: None)
    named = Named([[Name("red", 0.5)], []], np.array([0.0, np.nan]), 0.25, [Name("blue", 0.1)], torch.tensor([3, 0]))
    _told(NameArguments(sae="s", activations="a", embeddings="e", text_model="hf:t", output=Path("n.csv")), named)
    control = "Control: 1 directions of the same activations on other images; their best words score 0.100 (median). "
    assert said[1] == f"{control}Words that score below 0.250 are no name: one control in 20 scores above it."
