"""The paper's steering score (docs/recipe.md section 4), with the controls that it lacks.

A latent's target is the mean embedding of its 16 most activating images. The model is asked about images drawn at
random, the same for every latent (so some may be among its own top images), with the latent steered, and the score is
the cosine between the target and the answer's text embedding. Conditions:

    steered               the latent clamped at alpha
    sae_attached          no edit, but the SAE in place: the residual stream is its reconstruction (error="drop")
    unsteered             the model as it is
    random_latent         another latent that fires somewhere, its change of equal norm: alpha |W_dec[k]| / |W_dec[j]|
    sign_flip             the latent clamped at -alpha
    difference_of_means   alpha |W_dec[k]| along (mean residual of the top images - mean residual of random images)

The last one needs no SAE direction; it is added to the same base as the latent's change, so the two differ in nothing
else. Shape suffixes: L latents chosen, K top images, E embedding, D width, Q images asked about.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.config import WHITE, ScoreConfig, ScoreRun
from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.pairing import check_images_once, checked_ids
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import ImageError, Interrupted, require
from saevlm_fast.files import remove_leftovers, sha256_file, weights_sha256
from saevlm_fast.images.decode import decode
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.outputs import LOCK_FILE, check_absent, output_lock
from saevlm_fast.records import check_same_settings, write_record
from saevlm_fast.runtime import interruptible
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.tables import check_scores_path, write_table
from saevlm_fast.scoring.top_images import top_images
from saevlm_fast.steering.answers import SteeredAnswers, SteeredRow
from saevlm_fast.steering.edits import clamp
from saevlm_fast.steering.table import (
    CONDITIONS,
    EMPTY,
    MEASURES,
    N_TOP,
    Row,
    SteeringScores,
    read_block,
    scores_of_rows,
    write_block,
)
from saevlm_fast.towers.text import TextEncoder

PER_LATENT = tuple(name for name in CONDITIONS if name not in ("sae_attached", "unsteered"))
_SETTINGS_FILE = "settings.json"


def firing_latents(codes: StoredCodes, batch_rows: int = 65536) -> Tensor:
    """int64, the latents that fire on any image."""
    fires_S = torch.zeros(codes.d_sae, dtype=torch.bool)
    with closing(codes.chunks(batch_rows)) as chunks:
        for _, some in chunks:
            fires_S[some.top_indices] = True
    return fires_S.nonzero().squeeze(1)


def steering_score(
    answerer: SteeredAnswers,
    source: ImageSource,
    codes: StoredCodes,
    embeddings: Activations,
    encoder: TextEncoder,
    config: ScoreConfig,
    run: ScoreRun,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    on_written: Callable[[], None] = lambda: None,
) -> SteeringScores:
    """Scores latents under all conditions and writes the table, resumably.

    Args:
        answerer: model, SAE, layer, tokens and error term. Its batch size bounds how much is answered at once.
        source: the images that codes and embeddings are of, found by id.
        codes: one row an image (harvest --sae DIR --pool mean). embeddings: the same rows, in the text's space.
        on_rows: called with answers done and in all. on_written: called once the table stands, while the run could
            still be resumed: for what belongs beside it.

    Raises:
        ValueError: sides that do not fit; settings that are not those of the run to be resumed; a run that is there
            with neither resume nor force; a table that is there already, without force; a block that was altered;
            another process at work on it. Interrupted: SIGINT or SIGTERM; finished blocks are on the disk.
    """
    check_scores_path(run.output)
    latents = config.latents or tuple(range(codes.d_sae))
    with output_lock(run.output, directory=False):
        check_run(run)
        _check_sides(answerer, codes, embeddings, encoder, latents)
        settings = _settings(run, config, answerer, codes, embeddings)
        done = _finished_blocks(run, latents, settings)
        scorer = _Scorer(answerer, _Pictures(source, codes), encoder, config, latents, codes, embeddings)
        _start_run(run, settings)  # what is there has been left alone until the inputs were known to be usable
        scores = _score_blocks(scorer, latents, run, done, on_rows)
        write_table(scores.table, run.output)
        on_written()
        remove_progress(run)
        return scores


def _score_blocks(
    scorer: "_Scorer",
    latents: Sequence[int],
    run: ScoreRun,
    done: dict[int, list[Row]],
    on_rows: Callable[[int, int], None],
) -> SteeringScores:
    """Those blocks that are not done yet, and of all of them the table."""
    starts = range(0, len(latents), run.latents_per_block)
    todo = [start for start in starts if start not in done]
    total = sum(scorer.n_rows(start, run.latents_per_block) for start in todo)
    n_done, rows = 0, dict(done)
    with interruptible() as stop:
        for start in todo:
            _stop_if_asked(stop, run)
            report = partial(_report, on_rows, n_done, total)
            rows[start] = scorer.block(latents, start, run.latents_per_block, report)
            write_block(_block_file(run, start), rows[start])
            n_done += scorer.n_rows(start, run.latents_per_block)
    return scores_of_rows([row for start in starts for row in rows[start]], run.sources | scorer.description())


def _report(on_rows: Callable[[int, int], None], before: int, total: int, done_here: int) -> None:
    on_rows(before + done_here, total)


def _stop_if_asked(stop: threading.Event, run: ScoreRun) -> None:
    if stop.is_set():
        raise Interrupted(f"interrupted; continue with --resume --output {run.output}")


def _check_sides(
    answerer: SteeredAnswers, codes: StoredCodes, embeddings: Activations, encoder: TextEncoder, latents: Sequence[int]
) -> None:
    d_sae = answerer.sae.config.d_sae
    require(codes.d_sae == d_sae, f"codes: of {codes.d_sae} latents ({codes.path}), but the SAE has {d_sae}")
    require(
        min(latents) >= 0 and max(latents) < d_sae,
        f"latents: {min(latents)} to {max(latents)} are asked for; there are 0 to {d_sae - 1}",
    )
    require(
        embeddings.n_rows == codes.n_rows,
        f"embeddings: {embeddings.n_rows} rows ({embeddings.path}), but {codes.n_rows} of codes; row i of both must be "
        "the same image",
    )
    require(
        embeddings.d == encoder.d,
        f"embeddings: of width {embeddings.d} ({embeddings.path}), but the text model's have {encoder.d}; harvest them "
        "with --point projection of the same model",
    )
    check_images_once(codes)
    for _ in checked_ids(65536, codes, embeddings):
        pass


def _settings(
    run: ScoreRun, config: ScoreConfig, answerer: SteeredAnswers, codes: StoredCodes, embeddings: Activations
) -> dict[str, dict[str, Any]]:
    """What decides the table: a run is resumed with the same only."""
    return {
        "score": {**asdict(config), "latents": list(config.latents)},
        "steering": answerer.settings,
        "sources": run.sources,
        "contents": contents(answerer.sae, codes, embeddings),
        "run": {"latents_per_block": run.latents_per_block},
    }


def contents(sae: SparseAutoencoder, codes: StoredCodes, embeddings: Activations) -> dict[str, str]:
    """Digests of what is scored: files of the same names may hold something else by now."""
    return {
        "sae_weights_sha256": weights_sha256(sae),
        "codes_sha256": sha256_file(codes.index_file),  # which holds the digests of its shards
        "embeddings_sha256": embeddings.digest(),
    }


# What is on the disk: a run is unfinished from the first moment its settings are there until they are gone again. The
# table is written, and what belongs beside it, before they go; blocks without settings are nobody's.


def check_run(run: ScoreRun) -> None:
    """ValueError: an output or an unfinished run is there, and neither resume nor force says what becomes of it."""
    unfinished = is_unfinished(run)
    require(
        not unfinished or run.resume or run.force,
        f"output: an unfinished run is in {run.progress}; continue it with --resume, or --force",
    )
    check_absent([run.output], run.force or unfinished)  # a run that replaces it was begun with --force


def is_unfinished(run: ScoreRun) -> bool:
    """Whether there is a run to go on with."""
    return (run.progress / _SETTINGS_FILE).is_file()


def is_finished(run: ScoreRun) -> bool:
    """Whether the table is there, and no run that would replace it."""
    return run.output.is_file() and not is_unfinished(run)


def remove_progress(run: ScoreRun) -> None:
    """Of a run that has written its table; what a kill has left of that as well."""
    (run.progress / _SETTINGS_FILE).unlink(missing_ok=True)  # before the blocks, or one would be scored again
    for path in (*_blocks(run), run.progress / LOCK_FILE):  # the lock of an older version
        path.unlink(missing_ok=True)
    remove_leftovers(run.progress)
    with suppress(OSError):  # what else lies there stays
        run.progress.rmdir()


def _block_file(run: ScoreRun, start: int) -> Path:
    return run.progress / f"block_{start:06d}.json"


def _blocks(run: ScoreRun) -> list[Path]:
    return sorted(run.progress.glob("block_[0-9]*.json"))


def _finished_blocks(
    run: ScoreRun, latents: Sequence[int], settings: dict[str, dict[str, Any]]
) -> dict[int, list[Row]]:
    """Rows by the place of their first latent, of a run that is resumed. ValueError: one of other settings; damage."""
    if run.force or not is_unfinished(run):
        return {}
    check_same_settings(run.progress / _SETTINGS_FILE, settings)
    n = run.latents_per_block
    files = {start: _block_file(run, start) for start in range(0, len(latents), n)}
    return {start: read_block(file, latents[start : start + n]) for start, file in files.items() if file.exists()}


def _start_run(run: ScoreRun, settings: dict[str, dict[str, Any]]) -> None:
    """Anew, unless it is gone on with."""
    remove_leftovers(run.progress)
    if is_unfinished(run) and not run.force:
        return
    remove_progress(run)
    run.progress.mkdir(exist_ok=True)
    write_record(run.progress / _SETTINGS_FILE, settings)


class _Pictures:
    """RGB images by their row in the codes, found in the source by id."""

    def __init__(self, source: ImageSource, codes: StoredCodes):
        ids = codes.items()["image"].to_pylist()
        require(len(set(ids)) == len(ids), f"codes: several rows of one image ({codes.path}); harvest with --pool mean")
        self.source, self.ids = source, ids
        self.number = {source.image_id(i): i for i in range(len(source))}
        missing = [image_id for image_id in ids if image_id not in self.number]
        example = (missing or [""])[0]
        require(not missing, f"images: {len(missing)} of the codes' {len(ids)} are not there, as {example!r}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Any:
        image_id = self.ids[row]
        try:
            return decode(self.source.read(self.number[image_id]))
        except ImageError as error:
            raise ImageError(f"images: {image_id}: {error}") from error


class _Scorer:
    """Everything that all latents share: the images asked about, their unsteered answers, mean residuals."""

    def __init__(
        self,
        answerer: SteeredAnswers,
        pictures: _Pictures,
        encoder: TextEncoder,
        config: ScoreConfig,
        latents: Sequence[int],
        codes: StoredCodes,
        embeddings: Activations,
    ):
        self.answerer, self.pictures, self.encoder, self.config = answerer, pictures, encoder, config
        self.embeddings, self.alive = embeddings, firing_latents(codes)
        self.norm_S = answerer.sae.W_dec.detach().norm(dim=1)
        self.tops = [top.images for top in top_images(codes, latents, N_TOP)]
        for top in self.tops:  # damage and NaN are found now, not after hours of answers
            embeddings.rows(top)
        self._residuals: dict[int, Tensor] = {}
        self._words: dict[str, Tensor] = {}
        order = np.random.default_rng(config.seed).permutation(len(pictures))
        self.questions = [answerer.ask(picture, config.prompt) for picture in self._asked(order)]
        self.reference_D = self._mean_residual(order[: config.n_reference].tolist())
        n = len(self.questions)
        plain = answerer.answers([SteeredRow(q, edits) for edits in ((), None) for q in self.questions])
        self.unsteered = {"sae_attached": plain[:n], "unsteered": plain[n:]}

    def _asked(self, order: np.ndarray) -> list[Any]:
        if self.config.ask == 0:
            from PIL import Image

            return [Image.new("RGB", (336, 336), "white")]
        return [self.pictures[int(row)] for row in order[: self.config.ask]]

    def n_rows(self, start: int, n: int) -> int:
        """Answers that a block needs; none for latents that never fire."""
        return sum(len(top) > 0 for top in self.tops[start : start + n]) * len(PER_LATENT) * len(self.questions)

    def block(self, latents: Sequence[int], start: int, n: int, on_rows: Callable[[int], None]) -> list[dict[str, Any]]:
        """The table's rows of latents[start:start + n]."""
        places = range(start, min(start + n, len(latents)))
        firing = [place for place in places if len(self.tops[place]) > 0]
        random = {place: self._random_latent(latents[place]) for place in firing}
        rows = [row for place in firing for row in self._rows(place, latents[place], random[place])]
        answers = iter(self.answerer.answers(rows, on_rows))
        n_asked = len(self.questions)
        given = {p: {name: [next(answers) for _ in range(n_asked)] for name in PER_LATENT} for p in firing}
        return [self._scored(place, latents[place], random.get(place), given.get(place)) for place in places]

    def _rows(self, place: int, latent: int, random: int) -> list[SteeredRow]:
        """PER_LATENT conditions in order, each for every image asked about."""
        norm_S, alpha = self.norm_S, self.config.alpha
        direction_D = self._mean_residual(self.tops[place].tolist())
        direction_D = (
            torch.nn.functional.normalize(direction_D - self.reference_D, dim=0) * alpha * float(norm_S[latent])
        )
        equal = alpha * float(norm_S[latent] / norm_S[random])
        edits = (clamp(latent, alpha),), (clamp(random, equal),), (clamp(latent, -alpha),)
        rows = [SteeredRow(q, edit) for edit in edits for q in self.questions]
        return rows + [SteeredRow(q, (), direction_D) for q in self.questions]

    def _random_latent(self, latent: int) -> int:
        """Of those that fire somewhere, the same in every run."""
        others = self.alive[self.alive != latent]
        require(len(others) > 0, "codes: only one latent fires, so there is no random one to compare with")
        return int(others[np.random.default_rng((self.config.seed, latent)).integers(len(others))])

    def _mean_residual(self, rows: Sequence[int]) -> Tensor:
        for row in rows:
            if row not in self._residuals:
                self._residuals[row] = self.answerer.mean_residual(self.pictures[row], self.config.prompt)
        return torch.stack([self._residuals[row] for row in rows]).mean(0)

    def _scored(
        self, place: int, latent: int, random: int | None, given: dict[str, list[str]] | None
    ) -> dict[str, Any]:
        """One row of the table; NaN travels as None, which JSON has."""
        row: dict[str, Any] = {"latent": latent, "n_top": len(self.tops[place]), "other_latent": random}
        if given is None:
            return row | dict.fromkeys(("answer", "answer_share", *MEASURES))
        images_KE = self.embeddings.rows(self.tops[place])
        target_E = torch.nn.functional.normalize(torch.nn.functional.normalize(images_KE, dim=1).mean(0), dim=0)
        answer, count = Counter(given["steered"]).most_common(1)[0]
        row |= {"answer": answer, "answer_share": count / len(self.questions)}
        answers = {**self.unsteered, **given}
        row |= {name: self._cosine(answers[name], target_E) for name in CONDITIONS}
        return row | {name + EMPTY: answers[name].count("") / len(self.questions) for name in CONDITIONS}

    def description(self) -> dict[str, str]:
        """For the table's metadata."""
        config, n_asked = self.config, len(self.questions)
        settings = {name: str(value) for name, value in self.answerer.settings.items()}
        asked = str(n_asked) if config.ask else WHITE
        return settings | {
            "alpha": f"{config.alpha:g}",
            "ask": asked,
            "prompt": config.prompt,
            "seed": str(config.seed),
        }

    def _cosine(self, answers: Sequence[str], target_E: Tensor) -> float:
        """Mean over the images asked about."""
        new = sorted(set(answers) - set(self._words))
        if new:  # answers are what they are; each by itself, so that a resumed run has the same to the last bit
            self._words.update(zip(new, self.encoder.embed(new, batch_size=1, refuse=False)))
        return float(torch.stack([self._words[answer] for answer in answers]).double().mean(0) @ target_E.double())
