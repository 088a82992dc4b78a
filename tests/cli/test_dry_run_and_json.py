"""--dry-run checks, tells and writes nothing; --json prints one object."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from command import files_below, run, run_json
from saevlm_fast.config import SAEConfig
from saevlm_fast.errors import Interrupted
from saevlm_fast.sae import SparseAutoencoder
from small_world import CALLS, spelled
from tiny_tower import WIDTH, save_clip, save_photos

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    save_clip(root / "clip")
    save_photos(root / "photos", 10)
    sae = SparseAutoencoder(SAEConfig(WIDTH, 24, 4, "topk"))
    torch.manual_seed(0)
    sae.reset_parameters(0)
    sae.save_pretrained(root / "sae")
    return root


def commands(data, sae, pictures, output):
    """What makes a result, with an output of its own."""
    files = "--activations", data / "activations.npy", "--embeddings", data / "embeddings.npy"
    size = "--d-sae", 64, "--k", 4, "--steps", 5, "--batch-size", 64
    images = "--model", f"hf:{pictures / 'clip'}", "--images", pictures / "photos", "--layer", 1, "--device", "cpu"
    pooled = "--pool", "mean", "--tokens", "all"
    return {
        "synthetic": ("synthetic", output, "--rows", 20),
        "train": ("train", *files[:2], "--output", output, *size),
        "ms-score": ("ms-score", *files, "--sae", sae, "--output", output.with_suffix(".json")),
        "harvest": ("harvest", *images, "--output", output),
        "codes": ("harvest", *images, "--output", output, "--sae", pictures / "sae", *pooled),
    }


NAMES = ("synthetic", "train", "ms-score", "harvest", "codes")


@pytest.mark.parametrize(("more", "again"), [((), "and --resume"), (("--force",), "and --resume in place of --force")])
def test_an_interrupted_harvest_says_how_it_goes_on(data, sae, pictures, tmp_path, monkeypatch, more, again):
    def interrupted(*given, **options):
        raise Interrupted("interrupted; continue with --resume --output X")

    monkeypatch.setattr("saevlm_fast.harvesting.run.harvest", interrupted)
    words = commands(data, sae, pictures, tmp_path / "out")["harvest"]
    said = run(*words, *more, code=130).splitlines()[-1]
    assert said == f"interrupted; continue with the same command {again}"


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_writes_nothing_and_says_what_would_be_done(name, data, sae, pictures, tmp_path):
    words = commands(data, sae, pictures, tmp_path / "out")[name]
    before = files_below(tmp_path), files_below(sae), files_below(pictures)
    text = run(*words, "--dry-run")
    for part in ("dry run: ", "memory", "disk", "free disk", " s "):
        assert part in text
    assert "Memory and disk are calculated. Times " in text
    assert ("memory leaves out" in text) == (name == "ms-score")
    figures = run_json(*words, "--dry-run")
    assert figures["dry_run"] is True
    assert figures["disk_bytes"] > 0
    assert any(figures[key] >= 0 for key in figures if key.endswith("_seconds"))
    assert (files_below(tmp_path), files_below(sae), files_below(pictures)) == before


# What a forward of 256 MiB takes, and what none takes. A process of its own: a peak of before, which a sandbox keeps,
# and memory that something else gives back meanwhile would hide it.
PEAKS = """
from pathlib import Path

import torch

from saevlm_fast.cli.planning import peak_memory

def denied(*given, **more):
    raise PermissionError("a sandbox")

cpu = torch.device("cpu")
with peak_memory(cpu) as peak:
    torch.ones(64 << 20).sum()
    taken = peak()
with peak_memory(cpu) as peak:
    none = peak()
Path.write_text = denied
with peak_memory(cpu) as peak:
    kept = peak()
print(taken >> 20, none >> 20, kept >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system says it of a CPU")
def test_the_peak_of_the_memory_is_the_works():
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=True)
    taken, none, kept = map(int, done.stdout.split())
    assert 128 < taken < 512
    assert max(none, kept) < 64


def test_the_memory_of_a_forward_is_in_the_figures(pictures, tmp_path, monkeypatch):
    words = "harvest", "--model", f"hf:{pictures / 'clip'}", "--images", pictures / "photos", "--layer", 1
    found = []
    for n_bytes in (0, 5 << 30):
        monkeypatch.setattr(
            "saevlm_fast.cli.harvest.peak_memory", lambda device, n_bytes=n_bytes: nullcontext(lambda: n_bytes)
        )
        found.append(run_json(*words, "--device", "cpu", "--output", tmp_path / "out", "--dry-run"))
    assert found[1]["a_forward_bytes"] == found[1]["memory_bytes"] - found[0]["memory_bytes"] == 5 << 30


LOADERS = {
    "harvest": "harvesting.inputs.tower_for",
    "train": "training.one_pass.OnePass.add",
    "steer": "cli.steer.steered_answers",
    "steerability": "clip_steering.run.Asking.__init__",
}


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_loaded_for_a_dry_run_is_not_taken_off_what_is_free(name, pictures, tmp_path, monkeypatch):
    """It is in what is needed, and would count twice."""
    SparseAutoencoder(SAEConfig(128, 16, 4, "topk")).save_pretrained(tmp_path / "sae")
    (tmp_path / "words.txt").write_text("red\nblue\n")
    places = {
        "photos": str(pictures / "photos"),
        "run": str(tmp_path / "sae"),
        "words.txt": str(tmp_path / "words.txt"),
    }
    photo = next((pictures / "photos").rglob("*.png"))
    called = CALLS[name] if name != "train" else CALLS["harvest"] | {"--d-sae": "16", "--k": "2", "--steps": "3"}
    given = {key: places.get(value, value) for key, value in called.items() if key not in ("--limit", "--workers")}
    given |= {"--output": str(tmp_path / "out.json")} if "--output" in given else {"--image": str(photo)}
    place, _, attribute = f"saevlm_fast.{LOADERS[name]}".rpartition(".")
    owner, loaded = resolve_name(place), []
    load = getattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, lambda *a, **k: [load(*a, **k), loaded.append(1)][0])
    for module in ("planning", *((name,) if name != "train" else ("one_pass",))):
        known = f"saevlm_fast.cli.{module}.free_memory"
        monkeypatch.setattr(known, lambda device: 1 if loaded else 1 << 50, raising=False)
    found = run_json(name, *spelled(given), "--dry-run")
    assert loaded
    assert found["free_memory_bytes"] == 1 << 50
    assert "memory_warning" not in found


def test_the_figures_of_a_dry_run_are_those_of_the_work(data, sae, pictures, tmp_path):
    words = commands(data, sae, pictures, tmp_path / "out")
    figures = run_json(*words["train"], "--dry-run")
    assert (figures["rows"], figures["d_in"], figures["d_sae"], figures["steps"]) == (3000, 32, 64, 5)
    run(*words["train"])
    size = sum(len(content or b"") for content in files_below(tmp_path / "out").values())
    assert size / 3 < figures["disk_bytes"] < 3 * size
    figures = run_json(*words["harvest"], "--dry-run", "--output", tmp_path / "store")
    assert figures["images"] == 10
    assert figures["stores"] == [f"{tmp_path / 'store'}: 10 x {WIDTH}"]
    figures = run_json(*words["ms-score"], "--dry-run")
    assert (figures["rows"], figures["latents"], figures["embedding_width"]) == (3000, 128, 16)


def test_a_dry_run_counts_every_pass(data, sae, pictures, tmp_path, monkeypatch):
    """Rates are held: what is left is the number of passes, a second one with intervals and null as two first ones."""
    from saevlm_fast.cli import ms_score

    class Steady(ms_score.Stopwatch):
        def __call__(self, done):
            self.seconds_each = 0.001
            raise ms_score.Enough

    monkeypatch.setattr(ms_score, "Stopwatch", Steady)
    words = commands(data, sae, pictures, tmp_path / "out")["ms-score"]
    for more, passes in (
        (("--one-pass",), 1),
        ((), 3),
        (("--controls", 2), 9),
        (("--variant", "visaebench"), 2),
        (("--variant", "tms"), 1),
    ):
        assert run_json(*words, "--dry-run", *more)["time_seconds"] == pytest.approx(3.0 * passes), more


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("train", ("--k", 65), "k: 65 must be between 1 and d_sae = 64"),
        ("train", ("--activations", "none.npy"), "none.npy: no such file"),
        ("ms-score", ("--sae", "none"), "no such file"),
        ("harvest", ("--images", "none"), "none"),
        ("harvest", ("--layer", 3), "layer"),
        ("harvest", ("--tokens", "random:99"), "tokens: 99 random ones"),
        ("codes", ("--tokens", "cls"), "sae: an SAE reads one point and one choice of tokens"),
    ],
)
def test_a_dry_run_refuses_what_the_work_refuses(name, more, message, data, sae, pictures, tmp_path):
    words = commands(data, sae, pictures, tmp_path / "out")[name]
    assert message in run(*words, *more, "--dry-run", code=2)


@pytest.mark.parametrize("name", ["train", "harvest"])
def test_a_dry_run_refuses_an_output_in_use(name, data, sae, pictures, tmp_path):
    words = commands(data, sae, pictures, tmp_path / "out")[name]
    run(*words)
    assert "already holds a" in run(*words, "--dry-run", code=2)
    assert "dry run: " in run(*words, "--dry-run", "--force")
    (tmp_path / "file").touch()
    assert "file" in run(*words, "--dry-run", "--output", tmp_path / "file" / "below", code=2)


@pytest.mark.parametrize("name", NAMES)
def test_json_is_one_object(name, data, sae, pictures, tmp_path):
    words = commands(data, sae, pictures, tmp_path / "out")[name]
    found = run_json(*words)
    assert found["output"] == str(tmp_path / ("out.json" if name == "ms-score" else "out"))
    if name == "train":
        assert 0 < found["evaluation"]["explained_variance"] < 1
        assert found["evaluation"]["rows"] == 3000
    if name == "ms-score":
        assert found["counts"]["defined"] > 0
        assert found["best_latents"][0]["ms"] == found["best"]
    if name in ("harvest", "codes"):
        assert (found["images"], found["skipped"]) == (10, 0)
        assert (tmp_path / "out" / "settings.toml").is_file()
        assert run_json("inspect", tmp_path / "out", "--verify")["verified"] == "every shard is whole"


def test_a_harvest_is_repeated_from_its_settings(data, sae, pictures, tmp_path):
    run(*commands(data, sae, pictures, tmp_path / "out")["codes"])
    run("harvest", "--config", tmp_path / "out" / "settings.toml", "--output", tmp_path / "again")
    first, again = files_below(tmp_path / "out"), files_below(tmp_path / "again")
    shards = [path.name for path in first if path.suffix == ".safetensors"]
    assert shards
    for name in shards:
        assert first[tmp_path / "out" / name] == again[tmp_path / "again" / name]
