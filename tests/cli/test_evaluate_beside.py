"""saevlm-fast evaluate: SAEs that were trained as controls, a tower of random weights, and masks."""

import numpy as np
import pytest
import torch
from PIL import Image

from command import run, run_json
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.evaluate import evaluate

N, P, D = 60, 4, 6


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Patches of a tower and of one of random weights, SAEs of both, one that was trained as a control, and masks."""
    root = tmp_path_factory.mktemp("beside")
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(N * P) % 3
    centers = 3 * torch.randn(3, D, generator=generator)
    ids = [f"{i}.jpg" for i in range(N)]
    items = {"image": np.repeat(ids, P).tolist(), "token": list(range(1, 1 + P)) * N, "label": [None] * N * P}
    sources = {}
    for name, drawn in (("store", {}), ("random", {"random_weights": {"what": "blocks", "seed": 0}})):
        layout = {"n_tokens": 1 + P, "n_prefix": 1, "has_cls": True, "grid": [2, 2]}
        model = {"spec": "hf:tower", "weights_sha256": name, **drawn}
        sources[name] = {"layer": 3, "point": "residual", "tokens": "patches", "layout": layout, "model": model}
        with ActivationWriter(root / name, D, torch.float32, sources[name], 100) as writer:
            writer.append(centers[kind] + torch.randn(N * P, D, generator=generator), items)
    as_control = {"training": {"control": "frozen-decoder", "seed": 0}}
    made = {"sae0": ("store", {}), "frozen": ("store", as_control), "drawn": ("random", {})}
    for seed, (name, (source, more)) in enumerate(made.items()):
        sae = SparseAutoencoder(SAEConfig(D, 12, 2, "topk", (), {"seed": 0, "source": sources[source], **more}))
        sae.reset_parameters(seed)
        sae.save_pretrained(root / name)
    (root / "masks").mkdir()
    for i in range(N):
        values = kind[P * i : P * i + P].numpy().astype(np.uint8).reshape(2, 2)
        Image.fromarray(np.repeat(np.repeat(values, 8, 0), 8, 1)).save(root / "masks" / f"{i}.png")
    return root


def words(there, output, *names):
    saes = [word for name in names for word in ("--sae", there / name)]
    return ("evaluate", *saes, "--activations", there / "store", "--output", output, "--device", "cpu")


def test_trained_controls_and_random_towers_stand_beside(there, tmp_path):
    given = words(there, tmp_path / "out", "sae0", "frozen", "drawn"), "--random-activations", there / "random"
    found = run_json(*given[0], *given[1:], "--controls", "untrained", "--masks", there / "masks")
    controls = {each["name"]: each["control"] for each in found["subjects"]}
    expected = {"sae0": None, "frozen": "frozen-decoder", "drawn": "random-weights", "untrained": "untrained"}
    assert controls == expected
    rows = {row["measure"]: row for row in found["table"]}
    for name in ("explained variance", "AP of patch labels", "purity excess of patches"):
        assert {each["control"] for each in rows[name]["against"]} == {*expected.values()} - {None}
        assert set(rows[name]["values"]) == {*expected}
    drawn = next(each for each in found["subjects"] if each["name"] == "drawn")["measures"]["reconstruction"]
    there_alone = evaluate(SparseAutoencoder.from_pretrained(there / "drawn"), open_activations(there / "random"))
    assert drawn["explained_variance"] == pytest.approx(there_alone["explained_variance"], abs=1e-6)
    patches = next(each for each in found["subjects"] if each["name"] == "sae0")["measures"]["patches"]
    assert (patches["patches"], patches["images"], patches["labels"]) == (N * P, N, 3)


def test_an_sae_of_random_weights_needs_its_activations(there, tmp_path):
    text = run(*words(there, tmp_path / "out", "sae0", "drawn"), code=2)
    assert "sae: drawn: trained on a tower of random weights; give its activations, --random-activations" in text
    more = "--random-activations", there / "store"
    text = run(*words(there, tmp_path / "out", "sae0", "drawn"), *more)
    assert "of another model; its codes of" in text.replace("\n", " ")
