"""Labels of patches: the rule that turns masks into them, their geometry, and the measures over patches."""

import numpy as np
import pytest
import torch
from codes_and_labels import random_codes
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.measures.codes import KeptCodes
from saevlm_fast.measures.label_scores import label_scores
from saevlm_fast.measures.masks import MaskRule, patch_labels, read_names, values_of_patches
from saevlm_fast.measures.measure import measure
from saevlm_fast.measures.patches import images_of_latents, labels_of_patches
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.geometry import PatchGrid

WHOLE = (0.0, 0.0, 1.0, 1.0)
GRID = PatchGrid(2, 3, 1)


def mask_of(values):
    """A pixel for each of 16 x 16 points of the 2 x 3 patches."""
    return np.repeat(np.repeat(np.array(values), 16, 0), 16, 1)


def test_the_rule():
    mask = mask_of([[1, 2, 3], [4, 255, 0]])
    rule = MaskRule()
    assert values_of_patches(mask, WHOLE, GRID, rule).tolist() == [1, 2, 3, 4, -1, 0]
    mask[:16, :8] = 7  # half of the first patch: two have half each, the lower number wins
    assert values_of_patches(mask, WHOLE, GRID, rule)[0] == 1
    mask[0, 8] = 7
    assert values_of_patches(mask, WHOLE, GRID, rule)[0] == 7
    assert values_of_patches(mask, WHOLE, GRID, MaskRule(share=0.6))[0] == -1, "mixed"
    mask[:16, :8] = 255
    mask[0, 8:10] = 255
    assert values_of_patches(mask, WHOLE, GRID, rule)[0] == -1, "1 has less than half"
    assert values_of_patches(mask, WHOLE, GRID, MaskRule(ignore=(0, 3, 255))).tolist() == [-1, 2, -1, 4, -1, -1]
    with pytest.raises(ValueError, match=r"mask_share: 0.4 is not from 0.5 to 1"):
        MaskRule(share=0.4)


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_the_rule_against_counting(share):
    generator = np.random.default_rng(0)
    mask = generator.choice([0, 1, 255], (32, 48), p=[0.45, 0.45, 0.1])
    mask[:, :16] = np.where(generator.random((32, 16)) < 0.8, 1, 0)
    found = values_of_patches(mask, WHOLE, GRID, MaskRule(share))
    for patch, value in enumerate(found):
        row, column = divmod(patch, 3)
        points = mask[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        enough = [v for v in (0, 1) if (points == v).mean() >= share]
        assert value == (enough[0] if enough else -1)


def test_what_the_tower_sees_of_a_mask():
    """The middle square of a wide mask; and padding around it is unknown."""
    mask = np.zeros((20, 60), int)
    mask[:, 20:30], mask[:, 30:40] = 1, 2
    middle = values_of_patches(mask, (1 / 3, 0.0, 2 / 3, 1.0), PatchGrid(2, 2, 1), MaskRule())
    assert middle.tolist() == [1, 2, 1, 2]
    padded = values_of_patches(mask[:, 20:40], (0.0, -0.5, 1.0, 1.5), PatchGrid(4, 2, 1), MaskRule())
    assert padded.tolist() == [-1, -1, 1, 2, 1, 2, -1, -1]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A store of CLS and 4 patches of 30 images in two folders, and masks of all but the last."""
    root = tmp_path_factory.mktemp("masks")
    generator = torch.Generator().manual_seed(0)
    ids = [f"folder{i % 2}/{i}.jpg" for i in range(30)]
    layout = {"n_tokens": 5, "n_prefix": 1, "has_cls": True, "grid": [2, 2]}
    with ActivationWriter(
        root / "store", 6, torch.float32, {"layer": 1, "point": "residual", "layout": layout}, 100
    ) as w:
        items = {"image": np.repeat(ids, 5).tolist(), "token": list(range(5)) * 30, "label": [None] * 150}
        w.append(torch.randn(150, 6, generator=generator), items)
    for i, identity in enumerate(ids[:-1]):
        path = root / "masks" / identity.replace(".jpg", ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.array([[i % 3, 1], [255, 2]], np.uint8)
        Image.fromarray(np.repeat(np.repeat(values, 10, 0), 10, 1)).save(path)
    (root / "names.csv").write_text("value,name\n0,sky\n1,tree\n")
    return root


def test_labels_of_the_rows_of_a_store(there):
    rule = MaskRule(names=read_names(there / "names.csv"))
    labels, n_found = patch_labels(open_activations(there / "store"), there / "masks", rule)
    assert (n_found, labels.names) == (29, ("2", "sky", "tree"))
    known = labels.known_N.reshape(30, 5)
    assert not known[:, 0].any(), "CLS"
    assert not known[:, 3].any(), "ignored"
    assert not known[-1].any(), "no mask"
    assert known[:-1, [1, 2, 4]].all()
    of_image = [labels.names[label] for label in labels.labels_M.reshape(29, 3)[1]]
    assert of_image == ["tree", "tree", "2"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: Image.new("RGB", (8, 8)).save(path), "has colours"),
        (lambda path: path.write_bytes(b"no picture"), "cannot identify"),
    ],
)
def test_masks_that_are_none(there, tmp_path, make, message):
    (tmp_path / "folder0").mkdir()
    make(tmp_path / "folder0" / "0.png")
    with pytest.raises(ValueError, match=f"masks: .*{message}"):
        patch_labels(open_activations(there / "store"), tmp_path, MaskRule())
    (tmp_path / "folder0" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"no mask of any image, such as 'folder0/0.jpg'"):
        patch_labels(open_activations(there / "store"), tmp_path, MaskRule())


@pytest.mark.parametrize("text", ["", "0,sky\n0,sea\n", "0\n", "a,b\nc,d\n"])
def test_names_that_are_none(tmp_path, text):
    (tmp_path / "names.csv").write_text(text)
    with pytest.raises(ValueError, match="mask_names"):
        read_names(tmp_path / "names.csv")


def patch_data(told, n_images=120, n_patches=4, seed=0):
    """Codes of patches and their labels, several of them unknown; latent 5 fires where class 1 is, if it is `told`."""
    generator = np.random.default_rng(seed)
    acts = random_codes(n_images * n_patches, 40, share=0.1, seed=seed)
    # A mask is of one class mostly: its patches are not independent.
    image_of_row = np.repeat(np.arange(n_images), n_patches)
    of_image = generator.integers(0, 3, n_images)[image_of_row]
    label = np.where(generator.random(len(acts)) < 0.8, of_image, generator.integers(0, 3, len(acts)))
    if told:
        acts[:, 5] = 2.0 * (label == 1)
    for latent in range(20, 40):  # latents of images: on all patches of some
        acts[:, latent] = (generator.random(n_images) < 0.15)[image_of_row]
    known = generator.random(len(acts)) < 0.9
    labels = LabelSet.of([f"class {c}" if k else None for c, k in zip(label, known)], "patches")
    return acts, labels, image_of_row, generator.random(n_images) < 0.5


def test_patches_against_scikit_learn_and_exchanged_masks():
    acts, labels, image_of_row, half_N = patch_data(True)
    codes = KeptCodes.of_dense(acts)
    found = labels_of_patches(codes, labels, image_of_row, half_N)
    known = labels.known_N
    scores = label_scores(codes.part(known), labels.part(known))
    has = labels.part(known).matrix().toarray() > 0
    for latent, label, auroc, ap in list(zip(scores.latent, scores.label, scores.auroc, scores.ap))[::7]:
        y, a = has[:, label], acts[known, latent].astype(np.float64)
        assert auroc == pytest.approx(roc_auc_score(y, a), abs=1e-10)
        assert ap == pytest.approx(average_precision_score(y, a), abs=1e-10)
    assert found.latents["purity:patches"][5] == 1
    assert found.latents["best_label:patches"][5] == "class 1"
    assert found.latents["best_ap:patches"][5] == 1
    fires = (acts > 0)[known]
    expected = [len(np.unique(image_of_row[known][fires[:, s]])) for s in range(40)]
    assert images_of_latents(codes.part(known), image_of_row[known]).tolist() == expected
    assert found.latents["images:patches"].tolist() == expected
    assert found.figures["left_out"] == (~known).sum()
    assert np.isfinite(found.latents["purity_chance:patches"]).all(), "one that meets unknown patches alone too"
    # Latents of whole images are purer than single patches would be, and no purer than exchanged masks make them.
    whole = found.latents["purity_excess:patches"][20:]
    assert abs(whole.mean()) < 4 * whole.std() / 20**0.5
    null = found.figures["selection"]["null"]
    assert null["ap"] < found.figures["selection"]["ap"] - 0.1


def test_latents_that_know_nothing_have_no_excess():
    acts, labels, image_of_row, half_N = patch_data(False, seed=3)
    figures = labels_of_patches(KeptCodes.of_dense(acts), labels, image_of_row, half_N).figures
    low, high = figures["excess"]["interval"]
    assert low < 0.01
    assert high > -0.01


def test_labels_of_patches_need_a_store_of_patches():
    """Before anything is measured: exchanged masks would be cut at the wrong rows."""
    labels = LabelSet.of(["a", "b"] * 10, "patches")
    x_ND = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"masks: .* is no store of as many patches of every image"):
        measure(SparseAutoencoder(SAEConfig(6, 12, 2, "topk")), x_ND, patch_labels=labels)
