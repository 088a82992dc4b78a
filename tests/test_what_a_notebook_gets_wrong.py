"""Loose arguments from a notebook: tensors are taken as they are, what is wrong is named in one line."""

import inspect
import itertools
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import saevlm_fast as sf
from saevlm_fast.data.store import TOKEN_SCHEMA
from saevlm_fast.settings import Settings
from saevlm_fast.towers.tower import HookPoint

X, E = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32), torch.randn(300, 8)
CONFIG = sf.SAEConfig.sized(16, k=3, expansion=4)


@pytest.fixture(scope="module")
def sae():
    return sf.train(X, CONFIG, steps=np.int64(20), batch_size=64, lr="auto")[0]


def test_tensors_arrays_and_paths_are_activations(sae, tmp_path):
    wrapped = sf.Activations.from_tensor(X)
    assert sf.evaluate(sae, X) == sf.evaluate(sae, wrapped)
    assert sf.score(X, E, sae, device="auto").table().equals(sf.score(wrapped, E.numpy(), sae).table())
    assert sf.top_images(X, [1], 3, sae)[0].images.tolist() == sf.top_images(wrapped, [1], 3, sae)[0].images.tolist()
    np.save(tmp_path / "x.npy", X)
    for path in (tmp_path / "x.npy", str(tmp_path / "x.npy")):
        assert sf.evaluate(sae, path) == sf.evaluate(sae, X)
        assert sf.score(path, E, sae).table().equals(sf.score(X, E, sae).table())
        assert sf.train(path, CONFIG, steps=2, batch_size=64)[1]["rows"] == 300
    assert repr(wrapped) == "Activations(300 x 16, float32, tensor [300, 16])"
    assert repr(sae) == "SparseAutoencoder(batch_topk, 16 -> 64, k = 3)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sae: sf.train(3, CONFIG), "activations: 3 is not Activations"),
        (lambda sae: sf.train(X, 64), "sae_config: 64 is not an SAEConfig"),
        (lambda sae: sf.train(X, CONFIG, {"steps": 3}), "config: {'steps': 3} is not a TrainConfig"),
        (lambda sae: sf.train(X, CONFIG, mono_embeddings=3, mono_weight=0.1), "mono_embeddings: 3 is not Activations"),
        (lambda sae: sf.train(X, CONFIG, mono_weight=-1), "mono_weight: -1 must be finite and positive"),
        (lambda sae: sf.train(X, CONFIG, control="none"), "control: 'none' is not one of frozen-decoder"),
        (lambda sae: sf.train(X, CONFIG, steps=2.5), "steps: 2.5 is not a whole number"),
        (lambda sae: sf.train(X, CONFIG, steps=True), "steps: True is not a whole number"),
        (lambda sae: sf.train(X, CONFIG, steps="many"), "steps: 'many' is not a whole number"),
        (lambda sae: sf.train(X, CONFIG, steps=None), "steps: is None"),
        (lambda sae: sf.train(X, CONFIG, betas=0.9), "betas: 0.9 is not a list"),
        (lambda sae: sf.train(X, CONFIG, betas=(2.0, 0.9)), r"betas: \(2.0, 0.9\) must be two numbers in \[0, 1\)"),
        (lambda sae: sf.train(X, CONFIG, eps=-1.0), "eps: -1.0 must be positive"),
        (lambda sae: sf.train(X, CONFIG, output=""), "output: is empty"),
        (lambda sae: sf.train(X, CONFIG, steps=1, batch_size=32, lr=1e38, warmup_steps=0), "NaN or inf after step 1"),
        (lambda sae: sf.SAEConfig.sized("64"), "d_in: '64' must be a whole number"),
        (lambda sae: sf.SAEConfig.sized(64, k=2.5), "k: 2.5 is not a whole number"),
        (lambda sae: sf.SAEConfig.sized(64, architecture=None), "architecture: is None"),
        (lambda sae: sf.SAEConfig.sized(64, groups=0.5), "groups: 0.5 is not a list"),
        (lambda sae: sf.measure(sae, X, controls="pca"), "controls: 'pca' is not a list"),
        (lambda sae: sf.measure(sae, X, controls=("pca", "pca")), "controls: pca is listed twice"),
        (lambda sae: sf.score(X, E, "sae"), "sae: 'sae' is not a SparseAutoencoder"),
        (lambda sae: sf.score(X, E, sae, device="gpu"), "device: 'gpu'"),
        (lambda sae: sf.top_images(X, [(1, 0.5)], 3, sae), "latents: torch.float32"),
        (lambda sae: sae.encode(X), r"x: array.* is not a tensor"),
        (
            lambda sae: sae.encode(torch.from_numpy(X).half()),
            r"x: float16, the SAE is float32; encode\(x.to",
        ),
        *(
            (lambda sae, n=n: sf.top_images(X, [1], n, sae), "n: .* is not a whole number")
            for n in ("2", 2.5, True, None)
        ),
        (lambda sae: sf.top_images(X, [1], 0, sae), "n: 0 must be at least 1"),
        (lambda sae: sf.top_images(X, [1], 10**30, sae), r"n: 10+ must be below 2\^62"),
        (lambda sae: sf.top_images(X, [1], 2, sae, batch_rows="8"), "batch_rows: '8' is not a whole number"),
        (lambda sae: sf.top_images(X, [1], 2, "sae"), "sae: 'sae' is not a SparseAutoencoder"),
        (lambda sae: sf.top_images(X, [1], 2, []), r"sae: \[\] is not a SparseAutoencoder"),
        (lambda sae: sf.score(X, E, sae, batch_rows=2.5), "batch_rows: 2.5 is not a whole number"),
        (lambda sae: sf.score(X, E, sae, device=0), "device: 0 is not a device"),
        (lambda sae: sf.evaluate("sae", X), "sae: 'sae' is not a SparseAutoencoder"),
        (lambda sae: sf.evaluate(sae, X, batch_rows=0), "batch_rows: 0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(sae, call, message):
    with pytest.raises(ValueError, match=message):
        call(sae)


def test_several_values_may_come_in_any_form():
    config = sf.TrainConfig(betas=np.array([0.5, 0.9], dtype=np.float64))
    assert config.betas == (0.5, 0.9)
    assert json.loads(json.dumps(config.to_dict()))["betas"] == [0.5, 0.9]
    with pytest.raises(ValueError, match="betas: 'a' is not a number"):
        sf.TrainConfig(betas=("a", "b"))
    assert sf.top_images(X, [], 3) == []


# --- every public name with values of wrong kinds ---------------------------------------------------------------------

SHOTS = sf.Activations.from_tensor(X)
WRONG = (
    object(),
    "x",
    2.5,
    -1,
    b"b",
    ["a", None],
    {},
    None,
    torch.randn(2, 2),
    np.arange(3),
    10**30,
    len,
)
# Made by the functions below and not by hand, or a name for values that are checked where they are used.
RETURNED = {
    *("ActivationError", "ImageError", "Interrupted", "SteeredRow", "__version__"),
    *("Evaluation", "MonosemanticityScores", "SparseCodes", "StoredCodes", "TopImages", "Tower", "Trained"),
    *("TrustedScores", "ShownLatent", "CrossModal", "LanguageTower"),
}
# What messages call an argument, where that is another word: what the command line calls it.
ALIASES = {"spec": "model|text_model", "directory": "path", "path": "images|output", "width": "d_sae"}
# Of processors, that refuse arrays themselves; for messages; a buffer; what torchrun's commands make.
NOT_TRIED = {"image", "name", "origin", "out", "peers"}


@pytest.fixture(scope="module")
def calls(sae, tmp_path_factory):
    """Every public function, class and method that takes arguments, with arguments that it takes."""
    tmp = tmp_path_factory.mktemp("kinds")
    sae.save_pretrained(tmp / "sae")
    items = {"image": [str(i) for i in range(len(X))], "token": [0] * len(X)}
    with sf.ActivationWriter(tmp / "store", 16, torch.float32, {}) as writer:
        writer.append(torch.from_numpy(X), items)
    modality = {"modality": ["text", "image"] * (len(X) // 2)}
    with sf.ActivationWriter(tmp / "pairs", 16, torch.float32, {}) as writer:
        writer.append(torch.from_numpy(X), items | modality)
    with sf.CodesWriter(tmp / "codes", 64, torch.float32, {}) as codes_writer:
        codes_writer.write_shard(0, sae.encode(torch.from_numpy(X)), items)
    loaded_tower, scored, numbers = sf.load_tower("hf:tiny-clip"), sf.score(X, E, sae), itertools.count()
    tower = loaded_tower.model

    def new(start, path, *arguments, **more):
        """A writer's directory is another one at each call."""
        return start(tmp / f"new{next(numbers)}" if path == "new" else path, *arguments, **more)

    def entered(context):
        return lambda *arguments, **more: context(*arguments, **more).__enter__()

    written = {"path": "new", "dtype": torch.float32, "source": {}}
    scores = {"activations": X, "embeddings": E, "sae": sae, "similarity": "cosine", "pool": None}
    scores |= {"batch_rows": 128, "device": "cpu"}
    trusted = scores | {"seed": 0}
    llava, processor = sf.load_llava("hf:tiny-llava")
    answering = {"model": llava, "processor": processor, "sae": tower_sae(llava), "layer": 1, "tokens": "all"}
    answering |= {"error": "drop", "batch_size": 2, "max_new_tokens": 1}
    answerer = sf.SteeredAnswers(**answering)
    picture = Image.new("RGB", (48, 48), "red")
    asked = sf.SteeredRow(answerer.ask(picture, "What colour is the object?"), None)
    site = {"model": tower, "sae": tower_sae(tower), "layer": 1, "tokens": "all", "error": "drop"}
    loaded = {"spec": "hf:tiny-clip", "device": "cpu"}
    config = sf.SAEConfig.sized(16, k=3, expansion=2)
    harvested = {"model": loaded_tower, "images": "scenes:test:2", "layer": 1, "point": "residual", "tokens": "cls"}
    harvested |= {"output": None, "sae": None, "device": "cpu"}
    return {
        "Activations.from_tensor": (sf.Activations.from_tensor, {"x": X}),
        "Activations.chunks": (SHOTS.chunks, {"n": 100, "rows": range(2)}),
        "Activations.rows": (SHOTS.rows, {"indices": torch.tensor([1, 2])}),
        "ActivationWriter": (
            partial(new, sf.ActivationWriter),
            written | {"d_in": 16, "rows_per_shard": 8},
            sf.ActivationWriter,
        ),
        "CodesWriter": (partial(new, sf.CodesWriter), written | {"width": 64}, sf.CodesWriter),
        "Edit": (sf.Edit, {"latent": 1, "factor": 1.0, "offset": 0.0}),
        "HarvestConfig": (sf.HarvestConfig, {"points": (HookPoint("residual", 1),)}),
        "HarvestOptions": (sf.HarvestOptions, {"output": tmp / "out"}),
        "LabelSet.of": (sf.LabelSet.of, {"labels": ["a", "b"]}),
        "RunOptions": (sf.RunOptions, {}),
        "SAEConfig": (sf.SAEConfig, {"d_in": 16, "d_sae": 32, "k": 3}),
        "SAEConfig.sized": (
            sf.SAEConfig.sized,
            {"d_in": 16, "expansion": None, "d_sae": 32, "k": 3, "architecture": "matryoshka", "groups": (0.5, 0.5)},
        ),
        "SparseAutoencoder": (
            sf.SparseAutoencoder,
            {"config": config, "device": "cpu", "dtype": torch.float32},
        ),
        "SparseAutoencoder.encode": (sae.encode, {"x": torch.from_numpy(X), "use_threshold": True}),
        "SparseAutoencoder.decode": (sae.decode, {"codes": sae.encode(torch.from_numpy(X)), "statistics": None}),
        "SparseAutoencoder.from_pretrained": (
            sf.SparseAutoencoder.from_pretrained,
            {"path": tmp / "sae", "device": "cpu", "dtype": None, "assume": None},
        ),
        "SparseAutoencoder.save_pretrained": (sae.save_pretrained, {"directory": tmp / "again"}),
        "LanguageAnswers": (sf.LanguageAnswers, answering | {"layer": 0}),
        "SteeredAnswers": (sf.SteeredAnswers, answering),
        "SteeredAnswers.ask": (answerer.ask, {"image": picture, "prompt": "What colour is the object?"}),
        "SteeredAnswers.answers": (answerer.answers, {"rows": [asked]}),
        "Taxonomy.of": (sf.Taxonomy.of, {"paths": {"a": ["b", "c"]}}),
        "TrainConfig": (sf.TrainConfig, {}),
        "add": (sf.add, {"latent": 1, "alpha": 2.0}),
        "clamp": (sf.clamp, {"latent": 1, "alpha": 2.0}),
        "cross_modal": (
            sf.cross_modal,
            {"activations": sf.open_activations(tmp / "pairs"), "sae": sae, "batch_rows": 128},
        ),
        "evaluate": (sf.evaluate, {"sae": sae, "activations": X, "batch_rows": 128}),
        "harvest": (partial(sf.harvest, workers=0), harvested, sf.harvest),
        "inspect": (sf.inspect, {"path": tmp / "store"}),
        "load_llava": (sf.load_llava, {"spec": "hf:tiny-llava", "device": "cpu", "dtype": "auto"}),
        "load_language": (
            sf.load_language,
            {"spec": "hf:tiny-llava", "device": "cpu", "dtype": torch.float32, "prompt": None},
        ),
        "load_text_encoder": (sf.load_text_encoder, loaded),
        "load_tower": (sf.load_tower, loaded),
        "measure": (
            sf.measure,
            {"saes": sae, "activations": X[:90], "embeddings": E[:90], "labels": ["a", "b", "c"] * 30, "taxonomy": None}
            | {"controls": (), "pool": "max", "batch_rows": 128, "behaviour": None, "output": None}
            | {"patch_labels": None, "random_activations": None},
        ),
        "show": (
            sf.show,
            {"latent": 1, "rows": sf.open_codes(tmp / "codes"), "sae": None, "n": 2, "pool": "max", "images": None}
            | {"side": 16, "batch_rows": 128},
        ),
        "open_activations": (sf.open_activations, {"path": tmp / "store"}),
        "open_activations.items": (sf.open_activations(tmp / "store").items, {"rows": [1, 2], "schema": TOKEN_SCHEMA}),
        "open_codes": (sf.open_codes, {"path": tmp / "codes"}),
        "open_images": (sf.open_images, {"path": "scenes:test:3"}),
        "rank_agreement": (sf.rank_agreement, {"scores": {"a": scored, "b": scored}}),
        "scale": (sf.scale, {"latent": 1, "factor": 2.0}),
        "score": (sf.score, scores | {"gamma": None}),
        "steer": (entered(sf.steer), site | {"part": "vision", "edits": [sf.clamp(1, 2.0)]}, sf.steer),
        "steer_rows": (entered(sf.steer_rows), site | {"rows": [[sf.clamp(1, 2.0)]], "tiles": [1]}, sf.steer_rows),
        "top_images": (
            sf.top_images,
            {"activations": X, "latents": [1], "n": 2, "sae": sae, "pool": "max", "batch_rows": 128},
        ),
        "train": (
            partial(sf.train, steps=1, batch_size=64),
            {
                "activations": X,
                "sae_config": CONFIG,
                "config": None,
                "options": None,
                "validation": None,
                "mono_embeddings": None,
            },
            sf.train,
        ),
        "SAESize": (sf.SAESize, {}),
        "StreamSettings": (sf.StreamSettings, {}),
        "train_many": (
            partial(sf.train_many, steps=1, batch_size=64),
            {"activations": X, "saes": {"a": CONFIG}, "config": None, "options": None, "validation": None},
            sf.train_many,
        ),
        "train_from_images": (
            partial(sf.train_from_images, steps=1, batch_size=2, layer=1, workers=0),
            {"model": loaded_tower, "images": "scenes:test:2", "saes": {"a": sf.SAESize(k=3)}, "config": None}
            | {"options": None, "stream": None, "images_path": None},
            sf.train_from_images,
        ),
        "trusted_score": (sf.trusted_score, trusted),
        "trusted_scores": (sf.trusted_scores, trusted | {"embeddings": {"e": E}}),
        "verify": (sf.verify, {"path": tmp / "store"}),
        "zero": (sf.zero, {"latent": 1}),
    }


def tower_sae(model):
    vision = getattr(model.config, "vision_config", model.config)
    return sf.SparseAutoencoder(sf.SAEConfig.sized(vision.hidden_size, k=3, d_sae=32, architecture="topk"))


def tried(function):
    """Parameters whose kind is looked at: not callbacks, flags (anything is true or false) and `NOT_TRIED`."""
    return {
        name
        for name, each in inspect.signature(function).parameters.items()
        if each.kind is not each.VAR_KEYWORD and not name.startswith("on_")
        if not isinstance(each.default, bool) and name not in NOT_TRIED
    }


def complaint(call, arguments, name, value):
    """What is wrong with the answer to a wrong value; None if it is taken, or refused in one line.

    Of some values no argument is: these are refused by its name.
    """
    never_right = type(value) in (object, type(len))
    try:
        call(**arguments | {name: value})
    except (ValueError, OSError) as error:
        by_name = not never_right or re.search(f"{name}|{ALIASES.get(name, name)}", str(error))
        return None if by_name and re.fullmatch(".+", str(error)) else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "was taken" if never_right else None


@pytest.mark.parametrize("public", sorted(set(sf.__all__) - RETURNED))
def test_every_public_function_refuses_wrong_kinds_by_the_name_of_the_argument(calls, public, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some values are names of files
    mine = {name: call for name, call in calls.items() if name.partition(".")[0] == public}
    assert mine, f"{public} is new: give `calls` arguments that it takes"
    for where, (call, arguments, *signature) in mine.items():
        names = tried(signature[-1] if signature else call)
        is_settings = isinstance(call, type) and issubclass(call, Settings)
        assert is_settings or names <= set(arguments), where
        call(**arguments)
        answers = {(name, repr(value)): complaint(call, arguments, name, value) for name in names for value in WRONG}
        assert not {question: answer for question, answer in answers.items() if answer is not None}, where
