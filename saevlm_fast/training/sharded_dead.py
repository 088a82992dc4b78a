"""The auxiliary loss (dead_latents.py) where the dead latents are spread over ranks. docs/recipe.md section 1.

Of every row, the d_in / 2 largest of all ranks' dead latents take part. Each rank offers no values, only counts of them
(choice.keep_largest_of_all), and its part of the reconstruction [B, d_in].

Shape suffixes: B rows of a batch, D d_in, A the rank's dead latents, C candidates of a row.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.kernels.common import on_gpu
from saevlm_fast.kernels.latent_gradient import dense_gradient_rows
from saevlm_fast.peers import Peers, Ranks, in_order
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.choice import keep_largest_of_all
from saevlm_fast.training.dead_latents import Auxiliary, DeadLatents

_BLOCK_ELEMENTS = 8 << 20  # of one [rows, dead] block
_GPU_ELEMENTS = 128 << 20  # the same: all rows are one, where memory allows


def shared_auxiliary(
    sae: SparseAutoencoder,
    ranks: Ranks,
    x_BD: Tensor,
    x_hat_BD: Tensor,
    dead: DeadLatents,
    alpha: float,
    n_batch_rows: int,
    frozen: str | None = None,
    most_dead: int | None = None,
) -> tuple[Auxiliary | None, int | Tensor]:
    """dead_latents.auxiliary of all ranks' dead latents: the loss, and the gradients of this rank's; None if none is
    dead. And how many are, in all.

    Args:
        sae: the rank's part.
        ranks: the others; all ask at once, also those without a dead latent.
        x_BD: the replica's rows of the batch.
        x_hat_BD: their reconstruction.
        dead: the rank's.
        alpha: the loss' weight.
        n_batch_rows: of all replicas.
        frozen: W_enc or W_dec, whose gradient is not made.
        most_dead: on a GPU, a bound on the dead latents of all ranks, which all have alike; None if there is none. As
            long as all of them take part, nothing is told of which do.
    """
    peers, n_rows, d_in = ranks.latents, n_batch_rows, x_BD.shape[1]
    own_number = dead.number  # not as_tensor of a number: a copy from the host would wait for the device
    if not isinstance(own_number, Tensor):
        own_number = torch.full((), own_number, dtype=torch.int64, device=x_BD.device)
    n_dead = peers.add_up(own_number.view(1))[0]
    if not on_gpu(x_BD) and int(n_dead) == 0:
        return None, 0
    residual_BD = x_BD - x_hat_BD
    mean_D = _over(ranks.rows, residual_BD.sum(0)) / n_rows
    variance = _over(ranks.rows, (residual_BD - mean_D).square().sum()) / n_rows
    defined = (variance > 0) & (n_dead > 0)

    inputs = _Inputs(sae, dead, x_BD - sae.b_dec.detach())
    W_dec_AD = sae.W_dec.detach()[inputs.dead_A]
    acts_BC, places_BC = inputs.best(d_in // 2)
    if d_in // 2 == 0:
        acts_BC = torch.zeros_like(acts_BC)
    elif on_gpu(x_BD):
        if most_dead is None or most_dead > d_in // 2:
            _keep_largest_(acts_BC, d_in // 2, peers)
    elif int(n_dead) > d_in // 2:
        kept_BC = keep_largest_of_all(acts_BC, d_in // 2, peers.add_up, peers.gather, peers.rank)
        acts_BC = torch.where(kept_BC, acts_BC, 0)

    part_BD = torch.empty_like(x_BD)
    for rows in inputs.blocks():
        torch.mm(inputs.placed(rows, acts_BC, places_BC), W_dec_AD, out=part_BD[rows])
    error_BD = _summed(peers, part_BD) - residual_BD
    aux = torch.where(defined, _over(ranks.rows, error_BD.square().sum()) / n_rows / variance, 0)
    error_BD *= torch.where(defined, 2 * alpha / (n_rows * variance), 0)

    dW_enc_AD, dW_dec_AD, db_enc_A = _gradients(inputs, acts_BC, places_BC, W_dec_AD, error_BD, frozen)
    dW_enc = None if dW_enc_AD is None else dense_gradient_rows(dead.latents_A, dW_enc_AD)
    dW_dec = None if dW_dec_AD is None else dense_gradient_rows(dead.latents_A, dW_dec_AD, sae.W_dec.detach())
    return Auxiliary(aux, dW_enc, dW_dec, db_enc_A), n_dead if on_gpu(x_BD) else int(n_dead)


def _gradients(
    inputs: "_Inputs",
    acts_BC: Tensor,
    places_BC: Tensor | None,
    W_dec_AD: Tensor,
    error_BD: Tensor,
    frozen: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """W_enc's and W_dec's rows [A, D], without those of frozen weights, and b_enc's [A]; added up block by block."""
    dW_enc_AD: Tensor | None = None
    dW_dec_AD: Tensor | None = None
    db_enc_A: Tensor | None = None
    for rows in inputs.blocks():
        acts_BA = inputs.placed(rows, acts_BC, places_BC)
        dacts_BA = torch.where(acts_BA > 0, error_BD[rows] @ W_dec_AD.T, 0)
        if frozen != "W_dec":
            dW_dec_AD = _with_product(dW_dec_AD, acts_BA.T, error_BD[rows])
        if frozen != "W_enc":
            dW_enc_AD = _with_product(dW_enc_AD, dacts_BA.T, inputs.centred_BD[rows])
        db_enc_A = dacts_BA.sum(0) if db_enc_A is None else db_enc_A.add_(dacts_BA.sum(0))
    assert db_enc_A is not None  # a batch has rows
    return dW_enc_AD, dW_dec_AD, db_enc_A


def _with_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """The first block's is the total itself."""
    return a @ b if total is None else total.addmm_(a, b)


def _keep_largest_(acts_BC: Tensor, k: int, peers: Peers) -> None:
    """Zeros all but the k largest of every row of all ranks' activations, on a GPU."""
    from saevlm_fast.kernels.shared_choice_triton import Told
    from saevlm_fast.kernels.shared_largest_triton import launch_keep_largest_

    with torch.cuda.device_of(acts_BC):
        launch_keep_largest_(acts_BC, k, Told(peers.add_up, peers.gather, peers.rank))


class _Inputs:
    """What the dead latents of a rank see, a block of rows at a time."""

    def __init__(self, sae: SparseAutoencoder, dead: DeadLatents, centred_BD: Tensor):
        self.dead, self.d_sae, self.centred_BD = dead, sae.config.d_sae, centred_BD
        self.dead_A = dead.latents_A.clamp(max=self.d_sae - 1)
        self.W_enc_AD, self.b_enc_A = sae.W_enc.detach().T[self.dead_A], sae.b_enc.detach()[self.dead_A]

    def blocks(self) -> list[slice]:
        n_rows, most = len(self.centred_BD), _GPU_ELEMENTS if on_gpu(self.centred_BD) else _BLOCK_ELEMENTS
        size = max(1, most // max(len(self.b_enc_A), 1))
        return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]

    def best(self, k: int) -> tuple[Tensor, Tensor | None]:
        """(acts, places among the dead latents) [B, C] of the min(k, A) largest of every row; or of all in their order,
        without places."""
        values, places, blocks = [], [], self.blocks()
        for rows in blocks:
            acts_BA = torch.addmm(self.b_enc_A, self.centred_BD[rows], self.W_enc_AD.T).relu_()
            if isinstance(self.dead.number, Tensor):  # a GPU's padding is never active
                acts_BA.masked_fill_(self.dead.latents_A == self.d_sae, 0)
            if len(blocks) == 1 and (on_gpu(acts_BA) or acts_BA.shape[1] <= k):
                return acts_BA, None
            found = torch.topk(acts_BA, min(k, acts_BA.shape[1]), dim=1, sorted=False)
            values.append(found.values)
            places.append(found.indices)
        return torch.cat(values), torch.cat(places)

    def placed(self, rows: slice, acts_BC: Tensor, places_BC: Tensor | None) -> Tensor:
        """[b, A] of these rows."""
        if places_BC is None:
            return acts_BC[rows]
        acts_bA = acts_BC.new_zeros(len(acts_BC[rows]), len(self.b_enc_A))
        return acts_bA.scatter_(1, places_BC[rows], acts_BC[rows])


def _over(rows: Peers, part: Tensor) -> Tensor:
    """The sum of what the replicas' rows have."""
    return part if rows.world == 1 else in_order(rows.gather(part))


def _summed(peers: Peers, part_BD: Tensor) -> Tensor:
    """The ranks' parts added up, on every rank: each adds up a share of the rows."""
    n_rows, d_in = part_BD.shape
    share = -(-n_rows // peers.world)
    missing = share * peers.world - n_rows
    padded_BD = part_BD if missing == 0 else pad(part_BD, (0, 0, 0, missing))  # it would copy them
    received = peers.exchange(padded_BD.reshape(peers.world, share, d_in))
    return peers.gather(in_order(received)).view(-1, d_in)[:n_rows]
