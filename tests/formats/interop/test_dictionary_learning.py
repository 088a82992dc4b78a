"""SAEs of the real dictionary_learning against their own forward, and ours in its hands."""

import json

import pytest
import torch

from foreign_files import D, S, assert_same, rows
from foreign_trainers import K, Made, trainer
from saevlm_fast.formats import export
from saevlm_fast.formats.registry import read

pytest.importorskip("dictionary_learning", reason="install the extra [interop]")

from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
CLASSES = {
    "AutoEncoder": lambda: dictionary.AutoEncoder(D, S),
    "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D, S),
    "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D, S),
    "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D, S),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, S, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, S, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, S, K, [8, S - 8]),
}


def saved(folder, name):
    sae = CLASSES[name]()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            value = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(value.abs() if parameter_name == "threshold" else value)
        if "Batch" in name:
            sae.threshold.fill_(0.3)
    folder.mkdir(parents=True)
    torch.save(sae.state_dict(), folder / "ae.pt")
    more = {"k": K} if "TopK" in name else {}
    (folder / "config.json").write_text(json.dumps(trainer(name, **more)))
    return sae


def forward_of(sae):
    def forward(x_BD):
        with torch.no_grad():
            return sae.encode(x_BD.float()).double(), sae(x_BD.float()).double()

    return forward


@pytest.mark.parametrize("name", CLASSES)
def test_what_it_saves(tmp_path, name):
    sae = saved(tmp_path / "trainer_0", name)
    assert_same(read(tmp_path / "trainer_0"), Made("", {}, forward_of(sae)), torch.float32)


@pytest.mark.parametrize("name", CLASSES)
def test_ours_in_its_hands(tmp_path, name):
    """Its own loader makes rows of the decoder unit where the class is AutoEncoder: the reconstruction is the same."""
    sae = saved(tmp_path / "theirs", name)
    (tmp_path / "ours").mkdir()
    plain = read(tmp_path / "theirs")
    lost = export.write(plain, tmp_path / "ours", "dictionary_learning", lossy=True)
    again, config = load_dictionary(str(tmp_path / "ours"), "cpu")
    before, after = forward_of(sae)(rows()), forward_of(again)(rows())
    torch.testing.assert_close(after[1], before[1], atol=1e-5, rtol=1e-5)
    if not lost:
        torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=1e-5)
    assert bool(lost) == (name in ("AutoEncoder", "AutoEncoderNew"))
    assert config["trainer"]["layer"] == 22


@pytest.mark.parametrize("trainer_class", [BatchTopKTrainer, MatryoshkaBatchTopKTrainer])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_run_of_its_trainer(tmp_path, trainer_class, normalize):
    """Files that trainSAE itself writes: checkpoints with and without a threshold, and the finished SAE."""
    torch.manual_seed(0)
    data = (torch.randn(64, D) * 3 + 0.3 for _ in range(10_000))  # the norm is estimated on rows of their own
    config = {"trainer": trainer_class, "activation_dim": D, "dict_size": S, "k": K, "layer": 22, "lm_name": "clip"}
    config |= {"steps": 10, "threshold_start_step": 4, "device": "cpu", "warmup_steps": 1, "submodule_name": "resid"}
    config |= {"lr": 1e-3} if trainer_class is BatchTopKTrainer else {"lr": 1e-3, "group_fractions": [0.5, 0.5]}
    trainSAE(
        data=data,
        trainer_configs=[config],
        steps=10,
        save_dir=str(tmp_path),
        save_steps=[0, 8],
        normalize_activations=normalize,
        device="cpu",
        autocast_dtype=torch.float32,
    )
    folder = tmp_path / "trainer_0"
    first = read(folder / "checkpoints" / "ae_0.pt")
    assert first.activation == "topk"
    assert "no threshold was measured" in first.doubts[0]
    for path in (folder, folder / "checkpoints" / "ae_8.pt"):
        weights = path / "ae.pt" if path.is_dir() else path
        theirs = (trainer_class is BatchTopKTrainer and BatchTopKSAE) or MatryoshkaBatchTopKSAE
        sae = theirs.from_pretrained(str(weights))
        plain = read(path)
        assert plain.activation == "batch_topk"
        assert_same(plain, Made("", {}, forward_of(sae)), torch.float32)
        assert (plain.metadata["layer"], plain.metadata["model"]) == (22, "clip")
