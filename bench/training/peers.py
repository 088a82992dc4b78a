"""Other SAE libraries: their own public training loops on one task, not copies of them, and ours."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.config import (
    MATRYOSHKA_FRACTIONS,
    SELECTING,
    SAEConfig,
    TrainConfig,
    group_sizes_from_fractions,
)

FOREVER = 10**9  # steps or rows that a peer's schedule is told of
DEAD_AFTER = 10_000_000  # rows: nobody has a dead latent, or an auxiliary loss to compute, while the bench runs
AUXK_ALPHA = 1 / 32


@dataclass(frozen=True)
class Task:
    """One SAE to train, and how."""

    architecture: str
    d_in: int
    d_sae: int
    rows: int
    k: int
    device: str
    dtype: str
    threads: int
    data: Path

    @property
    def lr(self) -> float:
        return TrainConfig().peak_lr(self.d_sae)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        if self.architecture != "matryoshka":
            return ()
        return group_sizes_from_fractions(MATRYOSHKA_FRACTIONS, self.d_sae)


Batches = Iterator[Tensor]


def train_saevlm_fast(task: Task, batches: Batches) -> None:
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.training.capture import CapturedSteps
    from saevlm_fast.training.step import Stepper

    config = TrainConfig(warmup_steps=0, threshold_start=0, dead_after=DEAD_AFTER, auxk_alpha=AUXK_ALPHA)
    sae_config = SAEConfig(task.d_in, task.d_sae, task.k, task.architecture, task.group_sizes)
    steps = CapturedSteps(Stepper(SparseAutoencoder(sae_config, task.device), config))  # as `train` takes them
    for x_BD in batches:
        steps.step(x_BD)


def encoder_gemm(task: Task, batches: Batches) -> None:
    """The floor: x @ W_enc, on a CPU in panels that stay in cache, which is faster than one product."""
    dtype = torch.bfloat16 if task.dtype == "bfloat16" else torch.float32
    width = 2048 if task.device == "cpu" else task.d_sae
    W_enc_SD = torch.randn(task.d_sae, task.d_in, device=task.device, dtype=dtype)
    buffer = torch.empty(task.rows * width, device=task.device, dtype=dtype)
    for x_BD in batches:
        x_BD = x_BD.to(dtype)
        for W_PD in W_enc_SD.split(width):
            torch.mm(x_BD, W_PD.T, out=buffer[: task.rows * len(W_PD)].view(task.rows, len(W_PD)))


def train_dictionary_learning(task: Task, batches: Batches) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainers = {"topk": TopKTrainer, "batch_topk": BatchTopKTrainer, "matryoshka": MatryoshkaBatchTopKTrainer}
    groups = {"group_fractions": list(MATRYOSHKA_FRACTIONS)} if task.architecture == "matryoshka" else {}
    trainer = trainers[task.architecture](
        steps=FOREVER, activation_dim=task.d_in, dict_size=task.d_sae, k=task.k, layer=0, lm_name="none", lr=task.lr,
        auxk_alpha=AUXK_ALPHA, warmup_steps=0, threshold_start_step=0, device=task.device, **groups,
    )  # fmt: skip
    for step, x_BD in enumerate(batches):
        trainer.update(step, x_BD)


def train_sae_lens(task: Task, batches: Batches, sparse: bool = False) -> None:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    make_sae, make_config = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batch_topk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
        "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    }[task.architecture]
    widths = np.cumsum(task.group_sizes).tolist()
    options = {"matryoshka_widths": widths} if widths else {}
    sae = make_sae(
        make_config(
            d_in=task.d_in, d_sae=task.d_sae, k=task.k, device=task.device, use_sparse_activations=sparse, **options
        )
    )
    config = SAETrainerConfig(
        total_training_samples=FOREVER * task.rows, train_batch_size_samples=task.rows, lr=task.lr, lr_end=task.lr,
        device=task.device, dead_feature_window=DEAD_AFTER // task.rows,
    )  # fmt: skip
    SAETrainer(config, sae, batches).fit()


def train_sae_lens_sparse(task: Task, batches: Batches) -> None:
    train_sae_lens(task, batches, sparse=True)


def train_overcomplete(task: Task, batches: Batches) -> None:
    from overcomplete.sae import BatchTopKSAE, TopKSAE, train_sae

    def squared_error(x, x_hat, pre_codes, codes, dictionary):
        return (x - x_hat).square().sum(1).mean()

    if task.architecture == "topk":
        sae = TopKSAE(task.d_in, task.d_sae, top_k=task.k, device=task.device)
    else:  # its top_k is of the whole batch
        sae = BatchTopKSAE(task.d_in, task.d_sae, top_k=task.k * task.rows, device=task.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=task.lr)
    train_sae(sae, batches, squared_error, optimizer, nb_epochs=1, clip_grad=1.0, monitoring=0, device=task.device)


class _Rows(torch.nn.Module):
    """A module whose output is the next batch."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches, self.sample = batches, None

    def forward(self, ids: Tensor) -> Tensor:
        if self.sample is not None:  # sparsify only asks for the width
            return self.sample
        return next(self.batches)[None]


class _RowsModel(torch.nn.Module):
    """As much of a language model as sparsify's trainer asks for: one module, whose output is the next batch."""

    def __init__(self, task: Task, batches: Batches) -> None:
        super().__init__()
        self.device, self.base_model = torch.device(task.device), torch.nn.ModuleDict({"rows": _Rows(batches)})
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
        self.base_model["rows"].sample = torch.zeros(1, 1, task.d_in, device=task.device)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.base_model["rows"](input_ids)


class _Sequences(torch.utils.data.Dataset):
    """Endless sequences of as many tokens as a batch has rows."""

    def __init__(self, rows: int) -> None:
        self.ids = {"input_ids": torch.arange(rows)}

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.ids


def train_sparsify(task: Task, batches: Batches) -> None:
    from sparsify import SparseCoderConfig, Trainer
    from sparsify import TrainConfig as SparsifyConfig

    config = SparsifyConfig(
        SparseCoderConfig(num_latents=task.d_sae, k=task.k), batch_size=1, optimizer="adam", lr=task.lr,
        lr_warmup_steps=0, auxk_alpha=AUXK_ALPHA, dead_feature_threshold=DEAD_AFTER, hookpoints=["rows"],
        save_every=FOREVER, log_to_wandb=False,
    )  # fmt: skip
    model = _RowsModel(task, batches)
    trainer = Trainer(config, _Sequences(task.rows), model)
    model.base_model["rows"].sample = None
    trainer.fit()


@dataclass(frozen=True)
class Peer:
    """A library: what to install and import, its training loop, and where its duties differ from ours."""

    distribution: str
    module: str
    loop: Callable[[Task, Batches], None]
    architectures: tuple[str, ...]
    duties: str


OURS, FLOOR = "saevlm-fast", "encoder GEMM"
PEERS = {
    OURS: Peer(
        "saevlm-fast", "saevlm_fast.training.step", train_saevlm_fast, SELECTING,
        "Adam, projection, unit rows, clip, threshold, idle counts, auxiliary loss once latents are dead",
    ),
    FLOOR: Peer("torch", "torch", encoder_gemm, SELECTING, "one product, nothing else"),
    "dictionary-learning": Peer(
        "dictionary-learning", "dictionary_learning.trainers.top_k", train_dictionary_learning, SELECTING,
        "as ours, and a threshold for TopK too",
    ),
    "sae-lens": Peer(
        "sae-lens", "sae_lens", train_sae_lens, SELECTING,
        "no projection; divides by decoder norms instead of unit rows; firing frequencies besides",
    ),
    "sae-lens, sparse": Peer(
        "sae-lens", "sae_lens", train_sae_lens_sparse, ("topk",),
        "as sae-lens, with its use_sparse_activations",
    ),
    "overcomplete": Peer(
        "overcomplete", "overcomplete.sae", train_overcomplete, ("topk", "batch_topk"),
        "no b_dec, no projection, no auxiliary loss; whether latents ever fired for idle counts; unit rows in forward",
    ),
    "sparsify": Peer(
        "eai-sparsify", "sparsify", train_sparsify, ("topk",),
        "no clip, no threshold; copies the batch out of a model's hook; bfloat16 autocast on every GPU",
    ),
}  # fmt: skip
