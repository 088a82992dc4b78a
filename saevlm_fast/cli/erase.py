"""saevlm-fast erase: latents taken out of a CLIP, so that it stops reading words on images, or telling a factor."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.erase_images import argument_of, halves_of
from saevlm_fast.cli.erase_labels import COLUMNS, class_texts, labels_of, read_class_words
from saevlm_fast.cli.erase_options import WORDS, EraseArguments
from saevlm_fast.cli.options import Plan, command
from saevlm_fast.cli.planning import check_writable, memory_figures
from saevlm_fast.cli.record import Record
from saevlm_fast.cli.terminal import Bars, print_wide_table, say, tell, warn
from saevlm_fast.errors import goes_on, renamed, require

if TYPE_CHECKING:
    from saevlm_fast.cli.erase_labels import ClassWords
    from saevlm_fast.clip_steering.attacks import Style
    from saevlm_fast.clip_steering.erasing import Question, Told, Writing
    from saevlm_fast.clip_steering.stream import Vocabulary
    from saevlm_fast.clip_steering.units import Latents
    from saevlm_fast.images.sources import ImageSource
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.towers.text import TextEncoder
    from saevlm_fast.towers.tower import Tower


def check(options: EraseArguments) -> None:
    """ValueError: the output may not be written, or is there and whole."""
    from saevlm_fast.clip_steering.run import progress_of
    from saevlm_fast.outputs import check_several_absent

    check_writable(options.output)
    check_several_absent(options.files, progress_of(options.output), options.force)


# What goes in ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """Tower, text side, SAEs, and the images of both halves."""

    tower: "Tower"
    encoder: "TextEncoder"
    saes: "list[SparseAutoencoder]"
    words: "ClassWords | None"
    train: "tuple[ImageSource, list[int]]"
    test: "tuple[ImageSource, list[int]]"


def open_inputs(options: EraseArguments) -> Opened:
    """Everything that is read. ValueError: what does not fit, or does not exist."""
    from saevlm_fast.images.open import open_images
    from saevlm_fast.provenance import check_sae_of
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.towers.load import load_tower
    from saevlm_fast.towers.text import load_text_encoder

    device = resolve_device(options.device)
    source = open_images(options.images)
    asked = source
    if options.test_images is not None:
        with renamed("test_images", "images"):
            asked = open_images(options.test_images)
    words = None if options.class_words is None else read_class_words(options.class_words)
    saes = [SparseAutoencoder.from_pretrained(path, device=device) for path in options.sae]
    for path, layer, sae in zip(options.sae, options.layer, saes):
        check_sae_of(sae, layer, name=str(path))  # before a model is loaded
    with renamed("model", "text_model"):
        encoder = load_text_encoder(options.model, device, on_message=tell)
    require(encoder.logit_scale is not None, f"model: {encoder.spec} has no logit scale in its file")
    tower = load_tower(options.model, device, on_message=tell)
    for path, layer, sae in zip(options.sae, options.layer, saes):
        width, d_sae = tower.anatomy.width, sae.config.d_sae
        require(
            width in (None, sae.config.d_in), f"sae: d_in of {path} is {sae.config.d_in}, the tower is {width} wide"
        )
        most = max(options.k)
        require(
            2 * most <= d_sae, f"k: {most}, and as many others as a control, are more than {path} has: d_sae is {d_sae}"
        )
        if (doubt := check_sae_of(sae, layer, options.tokens, tower=tower, name=str(path))) is not None:
            warn(f"sae: {doubt}; what it makes of {options.tokens} tokens may mean little")
    return Opened(tower, encoder, saes, words, *halves_of(options, source, asked))


@dataclass(frozen=True)
class Asked:
    """What latents are chosen on, what is asked about, how words are written; the same for every layer."""

    train: "Told"
    questions: "dict[str, Question]"
    writing: "Writing"


def asked_of(options: EraseArguments, opened: Opened) -> Asked:
    """The labels and the texts. ValueError: of a single class, or of which the model does not know a word."""
    from saevlm_fast.clip_steering.attacks import check_letters
    from saevlm_fast.clip_steering.erasing import Question, Writing

    spec = options.labels if options.what == WORDS else options.what
    names: dict[str, list[str]] = {}
    for each in dict.fromkeys((options.labels, *((options.what,) if options.what != WORDS else ()), *options.also)):
        images = [opened.test, *([opened.train] if each == spec else [])]
        argument = argument_of(options, each)
        names[each] = sorted({name for part in images for name in labels_of(argument, each, *part).names})
        require(len(names[each]) >= 2, f"{argument}: {each} has a single class, {names[each][0]!r}")
    questions = {
        each: Question(_told(options, opened.test, each, known), _vocabulary(options, opened, each, known))
        for each, known in names.items()
    }
    train_style, test_style = _styles(options)
    words = [opened.words.of(column, names[options.labels]) if opened.words else None for column in COLUMNS[2:]]
    writing = Writing(train_style, test_style, *(tuple(each or ()) for each in words))
    if options.what == WORDS:
        for argument, style, each in zip(("fonts", "test_fonts"), (train_style, test_style), words):
            with renamed(argument, "fonts"):
                check_letters(style.fonts, each or names[options.labels])
    return Asked(_told(options, opened.train, spec, names[spec]), questions, writing)


def _told(options: EraseArguments, images: "tuple[ImageSource, list[int]]", labels: str, names: list[str]) -> "Told":
    """With classes numbered by `names`."""
    import numpy as np

    from saevlm_fast.clip_steering.erasing import Told

    source, numbers = images
    found = labels_of(argument_of(options, labels), labels, source, numbers)
    number = np.array([names.index(name) for name in found.names])
    y_N = np.append(number, -1)[found.single()]
    if options.groups is None:
        return Told(source, numbers, y_N, tuple(names), y_N)
    other = labels_of("groups", options.groups, source, numbers)
    groups = tuple(f"{name}, {group}" for name in names for group in other.names)
    of_other = other.single()
    group_N = np.where((y_N >= 0) & (of_other >= 0), y_N * len(other.names) + of_other, -1)
    return Told(source, numbers, y_N, groups, group_N)


def _vocabulary(options: EraseArguments, opened: Opened, labels: str, names: list[str]) -> "Vocabulary":
    from saevlm_fast.clip_steering.stream import Vocabulary

    said = opened.words.of("text", names) if opened.words is not None and labels == options.labels else None
    encoder = opened.encoder
    assert encoder.logit_scale is not None
    told = said or class_texts(labels, names, options.class_prompts)
    with renamed("class_words" if said else argument_of(options, labels), "texts"):
        texts_CE = encoder.embed(told)
    return Vocabulary(tuple(names), texts_CE, encoder.logit_scale)


def _styles(options: EraseArguments) -> "tuple[Style, Style]":
    from dataclasses import replace

    from saevlm_fast.clip_steering.attacks import TEST, TRAIN, check_fonts

    train = replace(TRAIN, fonts=options.fonts) if options.fonts else TRAIN
    test = replace(TEST, fonts=options.test_fonts) if options.test_fonts else TEST
    both = set(train.fonts) & set(test.fonts)
    require(not both, f"test_fonts: {', '.join(both)} chose the latents; words asked about need others")
    for argument, style in (("fonts", train), ("test_fonts", test)):
        with renamed(argument, "fonts"):
            check_fonts(style.fonts)
    return train, test


# The work -------------------------------------------------------------------------------------------------------------


def plan(options: EraseArguments) -> Plan:
    """What would be asked; the time from one batch of images."""
    import time

    from saevlm_fast.clip_steering.stream import opened_stream

    check(options)
    opened = open_inputs(options)
    asked_of(options, opened)
    n_train, n_test = len(opened.train[1]), len(opened.test[1])
    removals = 4 * len(options.k) + 1
    few = opened.test[1][: options.batch_size]
    with opened_stream(opened.tower, options.layer[0], options.tokens, options.batch_size) as stream:
        for _ in range(2):  # the first is checked, which takes longer
            start = time.perf_counter()
            batch = next(iter(stream.batches(opened.test[0], few)))
            seconds = (time.perf_counter() - start) / len(few)
        n_tokens, shape = batch.x_BTD.shape[1], batch.x_BTD.numel()
    seen, conditions = (2, 3) if options.what == WORDS else (1, 1)
    passes = len(opened.saes) * (seen * n_train + conditions * n_test * (1 + removals))
    entries = max(min(sae.config.d_sae, n_tokens * (sae.config.k or sae.config.d_sae)) for sae in opened.saes)
    return Plan(
        f"{options.what} erased from {options.model} by {len(opened.saes)} SAEs",
        {
            "images_for_choosing": n_train,
            "images_asked_about": n_test,
            "passes_of_an_image": passes,
            **memory_figures(opened.tower.device, 48 * seen * n_train * entries + 16 * shape),
            "time_seconds": passes * seconds,
        },
    )


@command("erase", plan=plan)
def erase(options: EraseArguments) -> dict[str, Any]:
    """What a CLIP still tells when latents are taken out: of images with words on them, or without a factor.
    Interrupted, it goes on."""
    from saevlm_fast.cli.erase_picture import write_accuracies, write_accuracy_picture
    from saevlm_fast.clip_steering.run import progress_of
    from saevlm_fast.files import remove_leftovers, write_json_atomic
    from saevlm_fast.outputs import begin_writing, output_lock

    progress = progress_of(options.output)
    with output_lock(options.output, directory=False):
        check(options)
        with goes_on("the same command goes on with the first SAE that is not finished"):
            layers = _layers(options, progress)
        document = {"format": "saevlm-fast erase", "version": 2, "what": options.what, "layers": layers}
        begin_writing(options.files, progress, options.force)
        write_accuracies(options.output.with_suffix(".csv"), layers)
        write_accuracy_picture(options.picture, layers, f"{options.what} taken out of {options.model}")
        write_json_atomic(options.output, document)
        Record("erase", options, options.output, classes=len(layers)).write()
        remove_leftovers(progress)
        shutil.rmtree(progress, ignore_errors=True)
    _print(options, layers)
    say(f"wrote {options.output}, the table {options.output.with_suffix('.csv')}, the picture {options.picture}")
    return {"output": str(options.output), **document}


def _layers(options: EraseArguments, progress: Path) -> list[dict[str, Any]]:
    """Of every SAE what was found, as JSON has it; those that are finished already are taken from `progress`."""
    from saevlm_fast.clip_steering.units import Latents
    from saevlm_fast.measures.parts import Parts, key_of
    from saevlm_fast.measures.results import Measured, plain

    opened = open_inputs(options)
    asked, parts, layers = asked_of(options, opened), Parts(progress, tell), []
    made_of = _made_of(options, opened, asked)
    for number, (path, layer, sae) in enumerate(zip(options.sae, options.layer, opened.saes)):
        units = Latents(sae)
        subject, key = f"layer-{number}", key_of(layer=layer, sae=units.made_of, **made_of)
        done = parts.read(subject, "accuracies", key)
        if done is None:
            with _of_which(f"layer {layer}, {path}"):
                done = Measured(_erase(options, opened, asked, layer, units))
            parts.write(subject, "accuracies", key, done)
        layers.append(plain({"sae": str(path), "layer": layer, **done.figures}))
    return layers


@contextmanager
def _of_which(sae: str) -> Iterator[None]:
    """Of which SAE it is said that it has too few latents."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} ({sae})" if str(error).startswith("k: ") else str(error)) from error


def _made_of(options: EraseArguments, opened: Opened, asked: Asked) -> dict[str, Any]:
    """What a finished layer follows from, beside the layer and its SAE."""
    every = {"what": asked.train} | {name: question.told for name, question in asked.questions.items()}
    return {
        "tower": opened.tower.description(),
        "images": [opened.train[0].fingerprint(), opened.test[0].fingerprint(), opened.train[1], opened.test[1]],
        "told": {name: [told.y_N.tolist(), told.group_N.tolist(), told.groups] for name, told in every.items()},
        "texts": {
            name: [each.classes.words, each.classes.texts_CE.double().tolist(), each.classes.logit_scale]
            for name, each in asked.questions.items()
        },
        "writing": repr(asked.writing),
        "choice": [options.what, options.k, options.select, options.tokens, options.seed],
    }


def _erase(options: EraseArguments, opened: Opened, asked: Asked, layer: int, units: "Latents") -> dict[str, Any]:
    from saevlm_fast.clip_steering.erasing import Choice, erase_factor, erase_words
    from saevlm_fast.clip_steering.stream import opened_stream

    n_test = len(opened.test[1])
    choice, questions = Choice(options.k, options.select, options.seed), dict(asked.questions)
    bars = Bars(f"layer {layer}, ", "images")
    with opened_stream(opened.tower, layer, options.tokens, options.batch_size) as stream, bars:
        if options.what != WORDS:
            found = erase_factor(stream, units, asked.train, questions, choice, bars.update)
        else:
            told = questions.pop(options.labels)
            found = erase_words(stream, units, asked.train, told, choice, asked.writing, questions, bars.update)
        if stream.skipped:
            number, why = next(iter(stream.skipped.items()))
            warn(
                f"test_images: {len(stream.skipped)} of {n_test} are not usable and were left out, the first is "
                f"{opened.test[0].image_id(number)}: {why}"
            )
        return found


def _print(options: EraseArguments, layers: list[dict[str, Any]]) -> None:
    from saevlm_fast.clip_steering.erasing import LEAST_OF_GROUP

    for each in layers:
        rows = each["table"]
        columns = [name for name in rows[0] if name not in ("removal", "k")]
        say(f"layer {each['layer']}, {each['sae']}: latents {', '.join(map(str, each['chosen_latents'][:8]))}")
        cells = [
            (f"{row['removal']} {row['k'] or ''}".strip(), *(_cell(row[name]) for name in columns)) for row in rows
        ]
        print_wide_table(("taken out", *columns), cells)
    if options.what == WORDS:
        clean, attacked, nonsense = (layers[0]["table"][0][name] for name in ("clean", "attacked", "nonsense"))
        if not attacked["value"] < nonsense["interval"][0]:
            say(
                f"{options.model} is not shown to read these words: nonsense in their place costs about as much "
                f"({nonsense['value']:.1%} right, words {attacked['value']:.1%}, nothing {clean['value']:.1%})."
            )
        say("reads: the share that is told as the drawn word.")
    say(f"In brackets: of the worst group that has {LEAST_OF_GROUP} images.")


def _cell(figures: dict[str, Any]) -> str:
    if figures["value"] is None:
        return "-"
    worst = figures.get("worst")
    return f"{figures['value']:.1%}" + ("" if worst is None else f" ({worst['value']:.0%})")
