"""What is said about scenes is true, and what is asked has one answer."""

import numpy as np
import pytest

from saevlm_fast.box.scenes import COUNTS, OBJECT_FACTORS, VALUES, SceneBatch, Scenes
from saevlm_fast.box_making.language import EOS, ONE_WORD, partial_descriptions, questions, vocabulary


@pytest.fixture(scope="module")
def scenes() -> SceneBatch:
    return Scenes(5).batch(0, 300)


def _is_true(text: str, labels: dict[str, list[str]]) -> bool:
    """Reads a description as a person does, from its words alone."""
    subject, _, ground = text.partition(" on ")
    for word in ground.replace("background", "").split():
        if word not in labels["background"] + labels["backdrop"]:
            return False
    if subject == "a scene":
        return True
    if subject.split()[0] in COUNTS:
        return [subject.split()[0]] == labels["count"]
    objects = [dict(zip(OBJECT_FACTORS, values)) for values in zip(*(labels[f] for f in OBJECT_FACTORS))]
    return all(any(_fits(phrase, thing) for thing in objects) for phrase in subject.split(" and "))


def _fits(phrase: str, thing: dict[str, str]) -> bool:
    what, _, place = phrase.partition(" at the ")
    article, *words = what.split()
    assert article == ("an" if words[0][0] in "aeiou" else "a")
    said = {word for word in words if word != "thing"}
    return said <= set(thing.values()) and place in ("", thing["place"])


def test_a_description_fits_the_scenes_of_which_its_words_are_true(scenes: SceneBatch) -> None:
    descriptions = partial_descriptions(scenes, np.random.default_rng(0))
    fit = descriptions.fit(scenes)
    labels = [scenes.labels(i) for i in range(len(scenes))]
    for m, text in enumerate(descriptions.texts()):
        assert fit[descriptions.scene[m], m]
        if m % 7 == 0:
            assert fit[:, m].tolist() == [_is_true(text, label) for label in labels], text
    assert 0.02 < fit.mean() < 0.5


def test_descriptions_say_every_factor_alone_now_and_then(scenes: SceneBatch) -> None:
    texts = set(partial_descriptions(Scenes(0).batch(0, 4000), np.random.default_rng(0)).texts())
    assert {"a star", "a red thing", "a striped thing", "a big thing", "a thing at the top left"} <= texts
    assert {"a scene on teal", "a scene on tiled background", "two things"} <= texts


def test_every_word_is_known(scenes: SceneBatch) -> None:
    known = set(vocabulary())
    texts = partial_descriptions(scenes, np.random.default_rng(1)).texts() + scenes.captions()
    for objects, setting in zip(scenes.objects, scenes.setting):
        texts += [f"{question.text} {question.answer}" for question in questions(objects, setting)]
    text = " ".join(texts).lower().replace("?", " ? ").replace("!", " ! ").replace(".", " . ")
    assert set(text.split()) <= known
    assert vocabulary().index(EOS) != 2  # transformers' CLIP would take another token's state for the text's


def test_a_question_names_one_object_and_its_answer_is_that_objects(scenes: SceneBatch) -> None:
    for i in range(100):
        labels = scenes.labels(i)
        objects = [dict(zip(OBJECT_FACTORS, values)) for values in zip(*(labels[f] for f in OBJECT_FACTORS))]
        for question in questions(scenes.objects[i], scenes.setting[i]):
            if question.asks in OBJECT_FACTORS and len(objects) > 1:
                meant = [thing for thing in objects if _is_meant(question.text, thing, question.asks)]
                assert [thing[question.asks] for thing in meant] == [question.answer], question
            elif question.asks in labels:
                assert labels[question.asks] == [question.answer]


def _is_meant(text: str, thing: dict[str, str], asked: str) -> bool:
    words = text.rstrip("?").split(" the ", 1)[1]
    return any(f" {value} " in f" {words} " for factor, value in thing.items() if factor != asked)


def test_one_word_is_asked_where_one_object_is_largest(scenes: SceneBatch) -> None:
    for objects, setting in zip(scenes.objects, scenes.setting):
        sizes = sorted(objects[objects[:, 0] >= 0][:, OBJECT_FACTORS.index("size")])
        answers = [question.answer for question in questions(objects, setting) if question.text == ONE_WORD]
        assert len(answers) == (len(sizes) == 1 or sizes[-1] > sizes[-2])
        assert set(answers) <= set(VALUES["shape"])
