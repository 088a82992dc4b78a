"""What is left of a tower's behaviour when an SAE stands in for its activations (behaviour_splice.py).

Of the tower's output, with the SAE at the CLS token, at the patches, and at all tokens: how near it is to the original,
which neighbours it keeps, and, where there are labels and a text side, zero-shot top-1, cross-entropy and KL, with the
logit scale applied. Recovered is

    (CE_ablated - CE_sae) / (CE_ablated - CE_original)

for each ablation, withheld where the denominator is below 5 % of CE_original or .05 nat. Linear probes are fitted on
half the images' original outputs and asked on the other half's spliced ones. Shape suffixes: N images, E output,
C classes, U texts.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.data.label_sets import LabelSet, halves
from saevlm_fast.errors import first_line, require
from saevlm_fast.images.sources import ImageSource
from saevlm_fast.measures.behaviour_splice import ABLATIONS, OF_SAE, Outputs, SplicedImages, output_point
from saevlm_fast.measures.probes import Probe, ProbeSet, kept
from saevlm_fast.measures.results import Figures, Measured, mean_figure, ratio, share
from saevlm_fast.measures.retrieval import NEIGHBOURS, image_text_recall, nearest, overlap, queries_of, votes
from saevlm_fast.measures.subjects import Model
from saevlm_fast.peers import Peers
from saevlm_fast.towers.text import TextEncoder
from saevlm_fast.towers.tower import HookPoint, Tower

TEMPLATE = "a photo of a {}"
LEAST_NATS, LEAST_SHARE = 0.05, 0.05
MOST_IMAGES = 5000
# Which splice stands for the SAE in the table, by the tokens it was trained on.
_OWN_TOKENS = {"cls": "cls", "patches": "patches", "mean": "patches", "random": "patches"}


@dataclass(frozen=True)
class BehaviourOptions:
    """What images are asked.

    Attributes:
        label_sets: of the images. captions: a text of each image, or none. prompts: a template with {}, or label ->
            texts. batch_size: images of a forward. workers: processes that read images, None as is best.
        no_text: why there is no text side, where that is known.
    """

    label_sets: tuple[LabelSet, ...] = ()
    captions: Sequence[str] | None = None
    prompts: str | Mapping[str, Sequence[str]] = TEMPLATE
    batch_size: int = 32
    workers: int | None = None
    no_text: str | None = None


def chosen_images(source: ImageSource, most: int = MOST_IMAGES) -> list[int]:
    """Numbers of at most that many images, evenly spaced."""
    return queries_of(len(source), most).tolist()


def read_prompts(text: str) -> str | dict[str, list[str]]:
    """A template with {}, or FILE.json of label -> text or list of texts. ValueError: neither."""
    if not text.endswith(".json"):
        require("{}" in text, f"class_prompts: {text!r} is neither a text with {{}} for the label nor FILE.json")
        return text
    try:
        document = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"class_prompts: {text}: {first_line(error)}") from None
    found = {}
    for label, texts in document.items() if isinstance(document, dict) else ():
        texts = [texts] if isinstance(texts, str) else texts
        plain = isinstance(texts, list) and len(texts) > 0 and all(isinstance(each, str) for each in texts)
        require(plain, f"class_prompts: {text}: {label!r} has {texts!r}, not a text or a list of texts")
        found[label] = texts
    require(len(found) > 0, f"class_prompts: {text}: not an object of labels and their texts")
    return found


def texts_of(labels: Sequence[str], prompts: str | Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The texts of each label. ValueError: a label that has none."""
    if isinstance(prompts, str):
        return [[prompts.replace("{}", label)] for label in labels]
    missing = [label for label in labels if label not in prompts]
    require(not missing, f"class_prompts: none of {len(missing)} labels, as {missing[:1]}")
    return [list(prompts[label]) for label in labels]


@dataclass(frozen=True)
class Asked:
    """One label set: classes_CE, unit text vectors, or why there are none; split, for probes, or None."""

    labels: LabelSet
    y_N: np.ndarray
    classes_CE: Tensor | None
    why: str | None
    split: ProbeSet | None

    def known(self) -> list[Any]:
        """JSON: what it is."""
        classes = None if self.classes_CE is None else self.classes_CE.tolist()
        return [self.labels.name, self.labels.names, self.y_N.tolist(), classes]


class Behaviour:
    """A tower and images, on which SAEs are measured one after the other; what does not depend on them is kept.

    Args:
        point: where the SAEs belong. trained_tokens: of their training, by name; None where it is not known.
        encoder: the model's text side, None where it has none.

    Raises:
        ValueError: nothing can be spliced there, labels of other images, a class without a prompt, words that the text
            side does not know.
    """

    def __init__(
        self,
        tower: Tower,
        source: ImageSource,
        chosen: Sequence[int],
        point: HookPoint,
        trained_tokens: str | None = None,
        encoder: TextEncoder | None = None,
        options: BehaviourOptions = BehaviourOptions(),
    ) -> None:
        self.tower, self.source, self.point, self.options = tower, source, point, options
        self.trained_tokens, self.encoder = trained_tokens, encoder
        self.images = SplicedImages(tower, point, source, chosen, options.batch_size, options.workers)
        self.ids = [source.image_id(i) for i in self.images.chosen]
        for each in options.label_sets:
            require(each.n_images == len(chosen), f"labels: {each.name} has {each.n_images} images, not {len(chosen)}")
        self.asked = {each.name: self._ask(each) for each in options.label_sets}
        self.texts = self._captions()
        self._usable_N = np.ones(len(chosen), bool)
        self._original_NE = torch.empty(0)  # what follows is made with the first SAE
        self._near: Tensor | None = None
        self._log_probabilities: dict[str, Tensor] = {}
        self._probes: dict[str, Probe] = {}
        self._read: dict[tuple[str, str], Reading] = {}

    def digest(self) -> str:
        """Of everything but the SAE."""
        known = {
            "model": self.tower.description(),
            "point": self.point.name,
            "tokens": self.trained_tokens,
            "images": self.source.fingerprint(),
            "chosen": [len(self.ids), self.ids[0], self.ids[-1]],
            "text": None if self.encoder is None else self.encoder.spec,
            "labels": [each.known() for each in self.asked.values()],
            "captions": self.options.captions,
            "batch": self.options.batch_size,
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    def _ask(self, labels: LabelSet) -> Asked:
        several = bool(np.diff(labels.offsets_N1).max(initial=0) > 1)
        y_N = np.full(labels.n_images, -1) if several else labels.single()
        why = "images with several labels" if several else self._no_text()
        if why is None and len(labels.names) < 2:
            why = "a single class"
        classes_CE = None
        if why is None:
            assert self.encoder is not None
            texts = texts_of(labels.names, self.options.prompts)
            flat_UE = self.encoder.embed([each for some in texts for each in some])
            of_class = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(some) for some in texts]))
            sums_CE = torch.zeros(len(texts), flat_UE.shape[1]).index_add_(0, of_class, flat_UE)
            classes_CE = torch.nn.functional.normalize(sums_CE, dim=1)
        split = ProbeSet.of(labels, halves(self.ids))
        return Asked(labels, y_N, classes_CE, why, split)

    def _no_text(self) -> str | None:
        if self.encoder is None:
            return self.options.no_text or f"{self.tower.spec} has no text side"
        if self.encoder.logit_scale is None:
            return f"{self.tower.spec} has no logit scale in its file"
        return None

    def _captions(self) -> tuple[Tensor, Tensor] | None:
        """Unit vectors of the different captions, and which one is each image's."""
        captions = self.options.captions
        if captions is None:
            return None
        require(self.encoder is not None, f"captions: {self.tower.spec} has no text side that reads them")
        assert self.encoder is not None
        require(len(captions) == len(self.ids), f"captions: {len(captions)} of {len(self.ids)} images")
        number: dict[str, int] = {}
        which = torch.tensor([number.setdefault(each, len(number)) for each in captions])
        return self.encoder.embed(list(number)), which

    # The work -----------------------------------------------------------------------------------------------------

    def measure(
        self,
        model: Model,
        on_images: Callable[[int], None] = lambda done: None,
        peers: Peers | None = None,
    ) -> Measured:
        """One SAE or control. peers: ranks that share the images, each with a Behaviour of its own, and have this all.

        Raises:
            ValueError: of another width than the tower.
        """
        found, relative = self.images.outputs(model, not self._read, on_images, peers)
        if not self._read:
            self._begin(found)
        original = self._read["", "original"]
        readings = self._read | {key: self._reading(out) for key, out in found.items() if key[1] in OF_SAE}
        n = int(self._usable_N.sum())
        figures: Figures = {
            "status": "defined",
            "n": n,
            "skipped": len(self.images.skipped),
            "model": self.tower.spec,
            "point": self.point.name,
            "output": output_point(self.tower).name,
            "trained_tokens": self.trained_tokens or "unknown",
            "neighbours": self._k(n),
            "overlap_chance": self._k(n) / max(n - 1, 1),
            "logit_scale": None if self.encoder is None else self.encoder.logit_scale,
            "sets": {name: self._about(each) for name, each in self.asked.items()},
            "original": original.figures(),
            "splices": {tokens: self._splice(tokens, readings, relative) for tokens in self.images.choices},
        }
        own = _OWN_TOKENS.get("".join(c for c in self.trained_tokens or "" if not c.isdigit()), "all")
        own = own if own in self.images.choices else "all"
        spliced = figures["splices"][own]
        figures["main"] = {"tokens": own, **spliced["variants"]["sae"], "recovered": spliced["recovered"]["sae"]}
        return Measured(figures)

    def _begin(self, found: Outputs) -> None:
        """What does not depend on an SAE: the original, and the ablations."""
        original_NE = found["", "original"]
        self._usable_N = original_NE.isfinite().all(1).numpy()
        require(int(self._usable_N.sum()) > 1, f"images: {int(self._usable_N.sum())} usable; two at least are needed")
        self._original_NE = original_NE[torch.from_numpy(self._usable_N)]
        self._read["", "original"] = self._reading(original_NE)
        self._read |= {key: self._reading(out) for key, out in found.items() if key[1] in ABLATIONS}

    def _k(self, n: int) -> int:
        return max(1, min(NEIGHBOURS, n - 1))

    def _about(self, asked: Asked) -> Figures:
        known_N = asked.y_N[self._usable_N]
        return {
            "classes": len(asked.labels.names),
            "n": int((known_N >= 0).sum()),
            "zero_shot": "defined" if asked.why is None else asked.why,
            "probe": "defined" if asked.split is not None else "too few images of two labels in both halves",
        }

    def _splice(
        self, tokens: str, readings: "Mapping[tuple[str, str], Reading]", relative: Mapping[str, float]
    ) -> Figures:
        original = readings["", "original"]
        variants = {name: readings[tokens, name] for name in (*OF_SAE, *ABLATIONS)}
        ablated = {name: variants[name] for name in ABLATIONS}
        return {
            "relative_error": relative[tokens],
            "variants": {name: each.figures() for name, each in variants.items()},
            "recovered": {name: _recovered(variants[name], original, ablated) for name in OF_SAE},
        }

    def _reading(self, out_NE: Tensor) -> "Reading":
        """What the outputs of the usable images say, beside the original's."""
        usable = torch.from_numpy(self._usable_N)
        out_NE = out_NE[usable]
        queries = queries_of(len(out_NE))
        near = nearest(out_NE, self._k(len(out_NE)), queries)
        self._near = near if self._near is None else self._near
        sets = {name: self._of_set(name, asked, out_NE, near, queries) for name, asked in self.asked.items()}
        recall = None
        if self.texts is not None:
            texts_UE, which = self.texts
            recall = image_text_recall(out_NE, texts_UE, which[usable])
        cosine_N = torch.nn.functional.cosine_similarity(out_NE.double(), self._original_NE.double(), dim=1)
        return Reading(cosine_N.numpy(), overlap(self._near, near).numpy(), sets, recall)

    def _of_set(self, name: str, asked: Asked, out_NE: Tensor, near: Tensor, queries: Tensor) -> dict[str, Any]:
        """Per image: ce, kl, right, agree of zero-shot; knn, probe: whether right; and their chances."""
        y_N = asked.y_N[self._usable_N]
        known_N = y_N >= 0
        if not known_N.any():
            return {}
        found: dict[str, Any] = {"chance": float(np.bincount(y_N[known_N]).max() / known_N.sum())}
        if asked.classes_CE is not None:
            log_NC = self._log_softmax(asked.classes_CE, out_NE)
            first = self._log_probabilities.setdefault(name, log_NC)
            chosen = torch.from_numpy(np.where(known_N, y_N, 0))[:, None]
            found["ce"] = -log_NC.gather(1, chosen)[:, 0].numpy()[known_N]
            found["kl"] = (first.exp() * (first - log_NC)).sum(1).numpy()
            found["right"] = log_NC.argmax(1).numpy()[known_N] == y_N[known_N]
            found["agree"] = (log_NC.argmax(1) == first.argmax(1)).numpy()
        asked_Q = known_N[queries.numpy()]
        if len(asked.labels.names) > 1 and asked_Q.any():
            voted = votes(near, torch.from_numpy(y_N), len(asked.labels.names)).numpy()
            found["knn"] = (voted == y_N[queries.numpy()])[asked_Q]
        if asked.split is not None:
            found |= self._of_probe(name, asked.split, out_NE)
        return found

    def _of_probe(self, name: str, whole: ProbeSet, out_NE: Tensor) -> dict[str, Any]:
        usable_N = self._usable_N
        split = ProbeSet(whole.y_N[usable_N], whole.fit_N[usable_N], whole.test_N[usable_N], whole.chance)
        out = out_NE.double().numpy()
        if len(np.unique(split.y_N[split.fit_N])) < 2 or not split.test_N.any():
            return {}
        if name not in self._probes:
            self._probes[name] = split.fit(out)
        return {"probe": split.right(self._probes[name], out), "probe_chance": split.chance}

    def _log_softmax(self, classes_CE: Tensor, out_NE: Tensor) -> Tensor:
        assert self.encoder is not None
        assert self.encoder.logit_scale is not None
        width = out_NE.shape[1]
        require(
            width == classes_CE.shape[1],
            f"model: outputs of {self.tower.spec} are {width} wide, its texts {classes_CE.shape[1]}",
        )
        cosine_NC = torch.nn.functional.normalize(out_NE.double(), dim=1) @ classes_CE.double().T
        return torch.log_softmax(self.encoder.logit_scale * cosine_NC + self.encoder.logit_bias, 1)


@dataclass(frozen=True)
class Reading:
    """One set of outputs: cosine_N with the original's, overlap_Q of neighbours, what labels say, recall of texts."""

    cosine_N: np.ndarray
    overlap_Q: np.ndarray
    sets: dict[str, dict[str, Any]]
    recall: Figures | None

    def figures(self) -> Figures:
        """Means, with intervals."""
        found: Figures = {"cosine": mean_figure(self.cosine_N), "overlap": mean_figure(self.overlap_Q), "sets": {}}
        for name, each in self.sets.items():
            one: Figures = {key: mean_figure(each[key]) for key in ("ce", "kl") if key in each}
            shares = {"top1": "right", "agreement": "agree", "knn": "knn", "probe": "probe"}
            one |= {key: share(each[at]) for key, at in shares.items() if at in each}
            found["sets"][name] = one
        return found if self.recall is None else found | {"retrieval": self.recall}


def _recovered(spliced: Reading, original: Reading, ablated: Mapping[str, Reading]) -> Figures:
    """Of every label set: cross-entropy recovered between each ablation and the original; accuracies kept of it."""
    found: Figures = {}
    for name, each in original.sets.items():
        mine, one = spliced.sets[name], {}
        if "ce" in each:
            least = max(LEAST_NATS, LEAST_SHARE * float(each["ce"].mean()))
            one["ce"] = {
                ablation: ratio(other.sets[name]["ce"] - mine["ce"], other.sets[name]["ce"] - each["ce"], least)
                for ablation, other in ablated.items()
            }
            one["top1"] = kept(mine["right"], each["right"], each["chance"])
        for key, chance in (("knn", "chance"), ("probe", "probe_chance")):
            if key in each:
                one[key] = kept(mine[key], each[key], each[chance])
        found[name] = one
    return found
