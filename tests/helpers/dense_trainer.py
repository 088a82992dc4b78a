"""The paper's trainer in dense autograd, written independently of saevlm_fast: the oracle for whole training steps.

Every matrix is dense [B, d_sae], gradients come from autograd, the optimiser is torch.optim.Adam. Matryoshka's
reconstruction loss is divided by the number of groups once (docs/recipe.md).
"""

import torch


class Jump(torch.autograd.Function):
    """h where it is above theta and 0; theta's gradient by a rectangle of width eps."""

    @staticmethod
    def forward(ctx, h, theta, eps):
        ctx.save_for_backward(h, theta)
        ctx.eps = eps
        return torch.where((h > theta) & (h > 0), h, 0)

    @staticmethod
    def backward(ctx, grad):
        h, theta = ctx.saved_tensors
        inside = ((h - theta).abs() < ctx.eps / 2) & (h > 0)
        dtheta = -(theta / ctx.eps * inside * grad).sum(0)
        return torch.where((h > theta) & (h > 0), grad, 0), dtheta, None


class Step(torch.autograd.Function):
    """1 where h is above theta and 0; the same rectangle."""

    @staticmethod
    def forward(ctx, h, theta, eps):
        ctx.save_for_backward(h, theta)
        ctx.eps = eps
        return ((h > theta) & (h > 0)).to(h.dtype)

    @staticmethod
    def backward(ctx, grad):
        h, theta = ctx.saved_tensors
        inside = ((h - theta).abs() < ctx.eps / 2) & (h > 0)
        return torch.zeros_like(h), -(inside / ctx.eps * grad).sum(0), None


class DenseTrainer:
    """A step-by-step dense re-implementation of docs/recipe.md."""

    def __init__(self, W_dec_SD, b_dec_D, *, architecture, k, group_ends, config, d_sae, theta=0.001):
        leaf = lambda t: t.clone().requires_grad_()  # noqa: E731
        self.W_enc, self.b_enc = leaf(W_dec_SD.T.contiguous()), leaf(torch.zeros(d_sae, dtype=W_dec_SD.dtype))
        self.W_dec, self.b_dec = leaf(W_dec_SD), leaf(b_dec_D)
        self.theta = leaf(torch.full((d_sae,), theta, dtype=W_dec_SD.dtype))
        self.parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.parameters += [self.theta] if architecture == "jumprelu" else []
        self.first_SD = W_dec_SD.clone()
        frozen = {"frozen-decoder": self.W_dec, "frozen-encoder": self.W_enc}.get(config.control)
        if frozen is not None:
            frozen.requires_grad_(False)
            self.parameters = [p for p in self.parameters if p is not frozen]
        self.architecture, self.k, self.group_ends, self.config = architecture, k, group_ends, config
        lr = config.lr if config.lr is not None else 2e-4 / (d_sae / 2**14) ** 0.5
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, betas=config.betas, eps=config.eps)
        warmup = config.warmup_steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: step / warmup if step < warmup else 1.0
        )
        self.idle = torch.zeros(d_sae, dtype=torch.long)
        self.threshold = -1.0
        self.n_steps = 0
        self.n_dead = 0

    def select(self, pre):
        if self.architecture == "topk":
            values, indices = pre.topk(self.k, dim=1)
            return torch.zeros_like(pre).scatter(1, indices, values)
        flat = pre.flatten()
        values, indices = flat.topk(self.k * len(pre))
        return torch.zeros_like(flat).scatter(0, indices, values).view_as(pre)

    def auxiliary(self, residual, pre):
        dead = self.idle >= self.config.dead_after
        self.n_dead = int(dead.sum())
        if self.n_dead == 0:
            return torch.zeros(())
        k_aux = min(residual.shape[1] // 2, self.n_dead)
        values, indices = torch.where(dead, pre, -torch.inf).topk(k_aux, dim=1)
        reconstruction = torch.zeros_like(pre).scatter(1, indices, values) @ self.W_dec
        error = (residual - reconstruction).pow(2).sum(1).mean()
        return (error / (residual - residual.mean(0)).pow(2).sum(1).mean()).nan_to_num(0.0)

    def penalised(self, h, x):
        """acts and the penalty of relu and jumprelu."""
        warmup = self.config.sparsity_warmup
        scale = min(self.n_steps / warmup, 1.0) if warmup else 1.0
        if self.architecture == "relu":
            acts = torch.relu(h)
            return acts, scale * self.config.l1 * acts.sum(1).mean()
        acts = Jump.apply(h, self.theta, self.config.bandwidth)
        l0 = Step.apply(h, self.theta, self.config.bandwidth).sum(1).mean()
        return acts, scale * (l0 / self.config.target_l0 - 1).pow(2)

    def loss(self, x):
        h = (x - self.b_dec) @ self.W_enc + self.b_enc
        pre, penalty = torch.relu(h), 0.0
        if self.architecture in ("relu", "jumprelu"):
            acts, penalty = self.penalised(h, x)
        else:
            acts = self.select(pre)
        if self.architecture not in ("relu", "jumprelu") and self.n_steps > self.config.threshold_start:
            smallest = acts[acts > 0].min().item() if (acts > 0).any() else 0.0
            beta = self.config.threshold_beta
            self.threshold = smallest if self.threshold < 0 else beta * self.threshold + (1 - beta) * smallest
        prefixes = [acts[:, :end] @ self.W_dec[:end] + self.b_dec for end in self.group_ends]
        mse = torch.stack([(x - x_hat).pow(2).sum(1).mean() for x_hat in prefixes]).mean()
        self.idle += len(x)
        self.idle[(acts > 0).any(0)] = 0
        self.aux = self.config.auxk_alpha * self.auxiliary((x - prefixes[-1]).detach(), pre)
        return mse + penalty + self.aux + self.mono(torch.where(acts > 0, h, 0), x)

    def mono(self, acts, x):
        """MonoLoss pair by pair; what is kept has a gradient, thresholds have none."""
        weight = self.config.mono_weight
        if weight is None:
            return 0.0
        norm = x.norm(dim=1, keepdim=True)
        u = torch.where(norm > 0, x / norm, 0)
        pairs = (u @ u.T).fill_diagonal_(0)
        several = (acts > 0).sum(0) > 1
        self.ms = (acts * (pairs @ acts)).sum(0)[several] / (acts.sum(0).square() - acts.square().sum(0))[several]
        return weight * (1 - self.ms.mean()) if several.any() else 0.0

    def held(self, w, first):
        """By angles: the rotation of a row towards where it began, as little as is needed."""
        tau = self.config.control_cosine
        if float(w @ first) >= tau:
            return w
        across = w - (w @ first) * first
        return tau * first + (1 - tau**2) ** 0.5 * across / across.norm()

    def step(self, x):
        loss = self.loss(x)
        self.optimizer.zero_grad()
        loss.backward()
        if self.W_dec.requires_grad:
            with torch.no_grad():
                unit = self.W_dec / self.W_dec.norm(dim=1, keepdim=True)
                self.W_dec.grad -= (self.W_dec.grad * unit).sum(1, keepdim=True) * unit
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        with torch.no_grad():
            if self.W_dec.requires_grad:
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
            if self.config.control == "soft-frozen":
                self.W_dec.copy_(torch.stack([self.held(*pair) for pair in zip(self.W_dec, self.first_SD)]))
            self.theta.clamp_(min=0)
        self.n_steps += 1
        return loss.item()
