"""Harvests of language layers: the rows, their items, and what may be done with the stores."""

import numpy as np
import pytest
import torch

from command import run, run_json
from saevlm_fast import harvest, outputs
from saevlm_fast.data.codes import open_codes
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import TOKEN_SCHEMA, verify
from saevlm_fast.errors import Doubt
from saevlm_fast.images.open import open_images
from saevlm_fast.images.pairs import is_wrong
from saevlm_fast.towers.text import load_llava
from tiny_tower import save_photos


def refused(*arguments):
    return run(*arguments, code=2)


PROMPT = "Describe the image."
BASE = ("harvest", "--model", "hf:tiny-llava", "--point", "language", "--workers", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Layers 0 and 1, every choice of tokens, of ten scenes in batches of four."""
    path = tmp_path_factory.mktemp("language")
    run(
        *(*BASE, "--layer", "0,1", "--tokens", "all,text,image,last", "--images", "scenes:test:10"),
        *("--prompt", PROMPT, "--batch-size", 4, "--images-per-shard", 4, "--output", path / "stores"),
    )
    return path


def states_of(i):
    """Hidden states of scene i in transformers' own words, and its token ids."""
    import io

    from PIL import Image

    model, processor = load_llava("hf:tiny-llava", dtype="float32")
    source = open_images("scenes:test:10")
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
        {"role": "assistant", "content": [{"type": "text", "text": source.caption(i)}]},
    ]
    text = processor.apply_chat_template(conversation)
    inputs = processor(images=[Image.open(io.BytesIO(source.read(i)))], text=[text], return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs, output_hidden_states=True).hidden_states, inputs["input_ids"][0]


def test_rows_are_output_hidden_states_of_each_pair_alone(stores):
    for layer in (0, 1):
        store = open_activations(stores / "stores" / f"language-{layer}-all")
        items = store.items(schema=TOKEN_SCHEMA).to_pydict()
        for i in (0, 3, 9):
            states, ids = states_of(i)
            rows = [r for r, image in enumerate(items["image"]) if image == f"test-0-{i:07d}"]
            assert [items["token_id"][r] for r in rows] == ids.tolist()
            assert [items["token"][r] for r in rows] == list(range(len(ids)))
            found = store.rows(torch.tensor(rows))
            assert (found - states[layer + 1][0]).norm() <= 1e-5 * found.norm()


def test_items_say_what_every_token_is(stores):
    path = stores / "stores" / "language-1-all"
    source = open_images("scenes:test:10")
    store = open_activations(path)
    table = store.items(schema=TOKEN_SCHEMA).to_pandas()
    lengths = table.groupby("image").size()
    assert len(set(lengths)) > 1  # ragged
    assert list(table["image"].unique()) == [source.image_id(i) for i in range(10)]
    for i, (_, rows) in enumerate(table.groupby("image")):
        words = source.caption(i).split()
        assert rows[rows.modality == "text"].text.tolist() == words
        assert (rows.modality == "image").sum() == 36
        assert rows[rows.modality == "template"].text.tolist()[:3] == ["<bos>", "user", ":"]
    assert store.items().column_names == ["image", "token", "label"]
    assert store.source["model"]["prompt"] == PROMPT
    assert store.source["layout"] is None
    verify(path)
    for tokens in ("text", "image", "last"):
        part = open_activations(stores / "stores" / f"language-1-{tokens}")
        kept = table[table.modality == tokens] if tokens != "last" else table.groupby("image").tail(1)
        assert part.n_rows == len(kept)
        assert torch.equal(part.rows(torch.arange(part.n_rows)), store.rows(torch.tensor(kept.index.to_numpy())))


def test_batches_change_rounding_alone(stores, tmp_path):
    call = (*BASE, "--layer", 1, "--images", "scenes:test:10", "--prompt", PROMPT)
    run(*call, "--batch-size", 1, "--output", tmp_path / "one")
    a, b = (open_activations(p) for p in (tmp_path / "one", stores / "stores" / "language-1-all"))
    x, y = (store.rows(torch.arange(store.n_rows)) for store in (a, b))
    assert a.items(schema=TOKEN_SCHEMA).equals(b.items(schema=TOKEN_SCHEMA))
    assert (x - y).norm() <= 1e-5 * x.norm()


def test_saes_train_and_score_on_them_and_codes_are_written(stores, tmp_path):
    store, sae, at = stores / "stores" / "language-1-all", tmp_path / "sae", ("--device", "cpu", "--output")
    few = ("--d-sae", 32, "--k", 4, "--steps", 20, "--batch-size", 64)
    run("train", "--activations", store, *few, *at, sae)
    clip = ("harvest", "--model", "hf:tiny-clip", "--point", "projection", "--images", "scenes:test:10", "--workers", 0)
    run(*clip, *at, tmp_path / "e")
    score = ("ms-score", "--activations", store, "--sae", sae, "--embeddings", tmp_path / "e", "--pool", "max")
    run(*score, *at, tmp_path / "scores.parquet")
    run(
        *BASE,
        "--layer",
        1,
        "--images",
        "scenes:test:10",
        "--prompt",
        PROMPT,
        "--sae",
        sae,
        "--output",
        tmp_path / "codes",
    )
    codes = open_codes(tmp_path / "codes")
    assert codes.n_rows == open_activations(store).n_rows
    assert "modality" in codes.items(schema=TOKEN_SCHEMA).column_names
    assert None not in codes.items(schema=TOKEN_SCHEMA)["modality"].to_pylist()
    pooled = (*BASE, "--layer", 1, "--images", "scenes:test:10", "--prompt", PROMPT, "--sae", sae, "--pool", "mean")
    run(*pooled, "--output", tmp_path / "pooled")
    assert open_codes(tmp_path / "pooled").n_rows == 10
    other = ("harvest", "--model", "hf:tiny-llava", "--images", "scenes:test:4", "--layer", 1, "--tokens", "all")
    said = refused(*other, "--sae", sae, "--device", "cpu", "--output", tmp_path / "no")
    assert "was trained on language of layer 1" in said


def test_from_python_and_with_wrong_captions():
    names = {"layer": 2, "point": "language", "workers": 0, "device": "cpu"}
    right = harvest("hf:tiny-llava", "scenes:test:6", tokens="text", **names)
    wrong = harvest("hf:tiny-llava", "scenes:test:6", tokens="text", wrong_captions=0.5, **names)
    said = [
        store.items(schema=TOKEN_SCHEMA).to_pandas().groupby("image").text.apply(" ".join) for store in (right, wrong)
    ]
    wrong_ids = [name for name in said[0].index if is_wrong(name, 0.5, 0)]
    assert said[0].index[said[0] != said[1]].tolist() == wrong_ids
    assert len(wrong_ids) >= 2
    assert wrong.source["images"]["wrong_captions"] == 0.5
    assert harvest("hf:tiny-llava", "scenes:test:2", **names).source["tokens"] == "all"


def test_resuming_needs_the_same_prompt(tmp_path):
    call = (*BASE, "--layer", 1, "--images", "scenes:test:4", "--output", tmp_path / "s")
    run(*call)
    run(*call, "--resume")
    assert "prompt" in refused(*call, "--resume", "--prompt", PROMPT)
    assert "wrong_captions" in refused(*call, "--resume", "--wrong-captions", 0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--images": "photos"}, "none of the first 3 images has a caption"),
        ({"--tokens": "cls"}, "tokens: cls of a language model, which has text, image, last, all"),
        ({"--tokens": "random:3"}, "tokens: random3"),
        ({"--layer": "3"}, "layer: 3 of hf:tiny-llava, whose language blocks are 0 to 2"),
        ({"--model": "hf:tiny-clip"}, "CLIPConfig"),
        ({"--model": "timm:vit_tiny_patch16_224"}, "no language part"),
        ({"--point": "language,residual"}, "point: language and residual-1 are not of one tower"),
        ({"--point": "residual", "--prompt": "x"}, "prompt: only for --point language"),
        ({"--point": "residual", "--wrong-captions": "0.5"}, "wrong_captions: only for --point language"),
        ({"--wrong-captions": "1.5"}, "wrong_captions"),
        ({"--prompt": " "}, "prompt: is empty"),
        ({"--compile": None}, "compile"),
        ({"--images": "long.csv"}, "its prompt has 429 tokens, the model's window 256"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    save_photos(tmp_path / "photos", 3)
    (tmp_path / "long.csv").write_text(f"path,caption\nphotos/class_0/photo_000.png,{'a red ' * 194}\n")
    given = {"--model": "hf:tiny-llava", "--point": "language", "--layer": "1", "--images": "scenes:test:4"}
    given |= {"--device": "cpu", "--output": "out", "--workers": "0"} | changes
    words = [word for pair in given.items() for word in pair if word is not None]
    assert said in refused("harvest", *words)


def test_rows_of_a_language_model_are_estimated_before_the_pairs(tmp_path, monkeypatch):
    """How many tokens a prompt has is known by then of the model's own pictures alone."""
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, 9_000))
    given = {"layer": 1, "point": "language", "device": "cpu"}
    with pytest.warns(Doubt, match=r"^output: what is left to write may take \S+ kB by estimate, and 9\.0 kB are free"):
        harvest("hf:tiny-llava", "scenes:test:4", tokens="all", output=tmp_path / "all", **given)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: (10**9, 0, 500))
    with pytest.raises(ValueError, match=r"^output: what is left to write takes \S+ kB, and 0\.5 kB are free"):
        harvest("hf:tiny-llava", "scenes:test:4", tokens="last", output=tmp_path / "last", **given)


def test_dry_run_counts_rows(tmp_path):
    told = run_json(*BASE, "--layer", 1, "--images", "scenes:test:8", "--output", tmp_path / "s", "--dry-run")
    assert told["images"] == 8
    assert not (tmp_path / "s").exists()
    assert np.isfinite(told["disk_bytes"])
