"""One of every input of the commands, small and made by them, and inputs that are wrong in every way."""

import os
import shutil
from pathlib import Path

import numpy as np

from command import run
from tiny_tower import save_photos

LAYER = 1
CALLS: dict[str, dict[str, str | None]] = {
    "synthetic": {"OUTPUT": "out", "--rows": "40", "--d-in": "8", "--d-embedding": "4", "--concepts": "6"},
    "harvest": {
        "--model": "hf:tiny-clip",
        "--images": "photos",
        "--layer": str(LAYER),
        "--limit": "4",
        "--workers": "0",
        "--device": "cpu",
        "--output": "out",
    },
    "train": {
        "--activations": "store",
        "--d-sae": "16",
        "--k": "2",
        "--steps": "3",
        "--batch-size": "16",
        "--device": "cpu",
        "--output": "out",
    },
    "demo": {"--output": "out", "--device": "cpu", "--dry-run": None},
    "ms-score": {
        "--activations": "store",
        "--sae": "run",
        "--embeddings": "embeddings",
        "--device": "cpu",
        "--output": "out.parquet",
    },
    "evaluate": {
        "--sae": "run",
        "--activations": "store",
        "--embeddings": "embeddings",
        "--controls": "raw",
        "--model": "hf:tiny-clip",
        "--images": "photos",
        "--class-prompts": "prompts.json",
        "--device": "cpu",
        "--output": "out",
    },
    "top-images": {
        "--sae": "run",
        "--activations": "tokens",
        "--latents": "0:4",
        "--n": "3",
        "--device": "cpu",
        "--output": "out",
    },
    "name": {
        "--sae": "run",
        "--activations": "tokens",
        "--embeddings": "embeddings",
        "--text-model": "hf:tiny-clip",
        "--device": "cpu",
        "--output": "out.parquet",
    },
    "report": {
        "--sae": "run",
        "--activations": "tokens",
        "--embeddings": "embeddings",
        "--device": "cpu",
        "--output": "out",
    },
    "steer": {
        "--model": "hf:tiny-llava",
        "--sae": "run",
        "--layer": str(LAYER),
        "--image": "photos/class_0/photo_000.png",
        "--prompt": "What is it?",
        "--latent": "3",
        "--alpha": "5",
        "--max-new-tokens": "2",
        "--device": "cpu",
    },
    "steering-score": {
        "--model": "hf:tiny-llava",
        "--sae": "run",
        "--layer": str(LAYER),
        "--images": "photos",
        "--codes": "codes",
        "--embeddings": "embeddings",
        "--text-model": "hf:tiny-clip",
        "--latents": "0:2",
        "--ask": "1",
        "--max-new-tokens": "1",
        "--device": "cpu",
        "--output": "out.json",
    },
    "cross-modal": {"--activations": "pairs", "--sae": "language", "--device": "cpu", "--output": "out"},
    "steerability": {
        "--model": "hf:tiny-clip",
        "--sae": "run",
        "--layer": str(LAYER),
        "--images": "photos",
        "--words": "words.txt",
        "--ask": "2",
        "--latents": "0:2",
        "--no-neurons": None,
        "--device": "cpu",
        "--output": "out.parquet",
    },
    "erase": {
        "--model": "hf:tiny-clip",
        "--sae": "run",
        "--layer": str(LAYER),
        "--images": "scenes:test:60",
        "--labels": "scene:backdrop",
        "--k": "1",
        "--limit": "10",
        "--device": "cpu",
        "--output": "out.json",
    },
    "human-agreement": {"--benchmark": "benchmark", "--device": "cpu", "--output": "out.json"},
    "inspect": {"PATH": "store"},
    "doctor": {"--facts-only": None, "--device": "cpu"},
}


def words(name: str, **changes: str) -> list[str]:
    """A call of a command that works, with other values of some options (n_reference="3")."""
    return [name, *spelled(CALLS[name] | {f"--{key.replace('_', '-')}": value for key, value in changes.items()})]


def spelled(given: dict[str, str | None]) -> list[str]:
    """Options and their values. One in capitals is given by its place; None is the value of a flag."""
    found = []
    for key, value in given.items():
        found += [key] if value is None else [value] if key.isupper() else [key, value]
    return found


def build_world(root: Path, n_images: int = 12) -> Path:
    """photos, store, embeddings, run (an SAE), codes, pairs, language (their SAE), matrix.npy, blocks.toml: what CALLS
    name, and more."""
    root.mkdir(parents=True, exist_ok=True)
    save_photos(root / "photos", n_images)
    harvest = ("harvest", "--images", root / "photos", "--workers", 0, "--device", "cpu")
    clip = (*harvest, "--model", "hf:tiny-clip")
    run(*clip, "--layer", LAYER, "--tokens", "all", "--output", root / "tokens")
    run(*clip, "--layer", LAYER, "--output", root / "store")
    run(*clip, "--point", "projection", "--output", root / "embeddings")
    train = ("train", "--activations", root / "tokens", "--d-sae", 16, "--k", 4, "--steps", 30, "--batch-size", 64)
    run(*train, "--device", "cpu", "--output", root / "run")
    llava = (*harvest, "--model", "hf:tiny-llava", "--layer", LAYER, "--tokens", "all")
    run(*llava, "--sae", root / "run", "--pool", "mean", "--output", root / "codes")
    pairs = ("--model", "hf:tiny-llava", "--point", "language", "--layer", LAYER, "--images", "scenes:test:6")
    run("harvest", *pairs, "--workers", 0, "--device", "cpu", "--output", root / "pairs")
    few = ("--d-sae", 16, "--k", 4, "--steps", 20, "--batch-size", 64, "--device", "cpu")
    run("train", "--activations", root / "pairs", *few, "--output", root / "language")
    (root / "blocks.toml").write_text("latents_per_block = 2\n")
    build_benchmark(root / "benchmark")
    (root / "words.txt").write_text("red\nblue\nstar\n")
    (root / "prompts.json").write_text('{"class_0": "red", "class_1": "blue", "class_2": ["green", "navy"]}')
    np.save(root / "matrix.npy", np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    return root


def build_benchmark(folder: Path) -> None:
    """Choices of people between three neurons, in the released layout."""
    folder.mkdir()
    header = "k_x,k_y,R_user,MS_x_dino,MS_y_dino,MS_x_clip,MS_y_clip"
    lines = ["1,2,1,.9,.5,.8,.6", "2,3,3,.5,.6,.6,.5", "1,3,1,.9,.6,.8,.5"]
    (folder / "pairs.csv").write_text("\n".join([header, *lines]))
    (folder / "activations.csv").write_text("k,a_1,a_2,a_3\n1,0,1,2\n2,3,0,1\n3,1,1,0\n")


def spoil(root: Path) -> list[str]:
    """Writes what is wrong into root, a directory of build_world; the names of all that is there."""
    bad = root / "bad"
    bad.mkdir()
    (bad / "empty").touch()
    (bad / "empty-directory").mkdir()
    os.mkfifo(bad / "fifo")
    for suffix in ("npy", "safetensors", "pt", "png", "txt", "tar", "parquet", "toml", "json"):
        (bad / f"text.{suffix}").write_text("no such thing\n")
        (bad / f"empty.{suffix}").touch()
        (bad / f"nul.{suffix}").write_bytes(bytes(64))
        os.mkfifo(bad / f"fifo.{suffix}")
        (bad / f"directory.{suffix}").mkdir()
    matrices = {
        "row": np.zeros(3),
        "whole": np.zeros((3, 3), int),
        "cube": np.zeros((2, 2, 2)),
        "none": np.zeros((0, 3)),
    }
    matrices |= {"nan": np.full((9, 128), np.nan, np.float32), "wide": np.zeros((2, 9000), np.float32)}
    matrices |= {"zeros": np.zeros((12, 128), np.float32), "huge": np.full((12, 128), 3e38, np.float32)}
    for name, matrix in matrices.items():
        np.save(bad / f"{name}.npy", matrix)
    (bad / "long.npy").write_bytes((root / "matrix.npy").read_bytes()[:-5])
    for kind in ("fifo", "directory"):
        for name in ("cfg.json", "index.json", "run.json", "config.json", "harvest.json"):
            (bad / f"{kind}-{name}").mkdir()
            there = bad / f"{kind}-{name}" / name
            os.mkfifo(there) if kind == "fifo" else there.mkdir()
    for name in ("cfg.json", "index.json", "run.json", "config.json", "harvest.json"):
        (bad / f"text-{name}").mkdir()
        (bad / f"text-{name}" / name).write_text('{"a": [1e400, {}], "model_type": 3, "d_in": "x"}')
    for weights in ("weights", "shard"):
        shutil.copytree(root / ("run" if weights == "weights" else "store"), bad / f"cut-{weights}")
    for file in (bad / "cut-weights" / "sae_weights.safetensors", *(bad / "cut-shard").glob("shard-*")):
        file.write_bytes(file.read_bytes()[:-7])
    (bad / "loop").symlink_to("loop")
    (bad / "dangling").symlink_to("nowhere")
    for name in ("caf\u00e9 \u732b.npy", "\x1b[31m\x07.npy", os.fsdecode(b"\xff\xfe.npy"), "a:tram:[b].npy"):
        np.save(bad / name, np.ones((4, 8), np.float32))
    (bad / "list.txt").write_text("\n".join(["../photos/none.png", "fifo.png", "\x1b[31m.png", "", "/"]))
    return sorted(str(path.relative_to(root)) for path in (*root.glob("*"), *bad.glob("*")))
