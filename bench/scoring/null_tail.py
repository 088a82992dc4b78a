"""How often p is below a limit under the null itself: normal law, Pearson III and counted draws, over shuffles.

    OMP_NUM_THREADS=1 python -m bench.scoring.null_tail [--shuffles B] [--images N]

For each kind of embeddings and each latent's activations (equal-ish, or heavy-tailed) the activations are put on random
images B times; what is printed is the share of these with p below the limit, over the limit: 1 is right.
"""

import argparse

import torch

from saevlm_fast.scoring.null import (
    FEW_IMAGES,
    N_POWERS,
    SimilarityMoments,
    drawn_images,
    drawn_pairs,
    null_deviation,
    null_skewness,
    sampled_tail,
    skewed_tail,
    third_order,
)

LIMITS = (0.05, 0.01, 0.001)
D_EMB = 64


def embeddings(kind: str, n: int, generator: torch.Generator) -> torch.Tensor:
    """Unit vectors [N, E] float64: of no structure, in clusters, of few dimensions, or with copies of 20 images."""
    x_NE = torch.randn(n, D_EMB, generator=generator, dtype=torch.float64)
    if kind == "clusters":
        centers = 1.5 * torch.randn(40, D_EMB, generator=generator, dtype=torch.float64)
        x_NE = centers[torch.randint(40, (n,), generator=generator)] + x_NE
    if kind == "few dimensions":
        x_NE = 3 * x_NE * torch.exp(-torch.arange(D_EMB) / 4)
    x_NE = x_NE + 0.3
    if kind == "copies":
        x_NE[: n // 10] = x_NE[torch.randint(n // 10, n // 10 + 20, (n // 10,), generator=generator)]
    return torch.nn.functional.normalize(x_NE, dim=1)


def calibration(kind: str, n: int, heavy: bool, n_images: int, n_shuffles: int) -> str:
    """One line."""
    generator = torch.Generator().manual_seed(n + heavy)
    u_NE = embeddings(kind, n_images, generator)
    b_n = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    if heavy:
        b_n = torch.exp(1.2 * torch.randn(n, generator=generator, dtype=torch.float64))
    ones_N = torch.ones(n_images, dtype=torch.float64)
    moments = SimilarityMoments(u_NE.sum(0), ones_N.sum(), n_images)
    v_NE, along_N = moments.centred_rows(u_NE, ones_N)
    moments.add(v_NE, along_N, ones_N)
    powers_PS = torch.stack([b_n.pow(m).sum() for m in range(1, N_POWERS + 1)])[:, None]
    deviation_S = null_deviation(powers_PS[:4], moments)
    skewness_S = null_skewness(powers_PS, third_order(v_NE.float(), along_N), deviation_S, n_images)
    found = []
    for _ in range(n_shuffles):
        t_E = b_n @ u_NE[torch.randperm(n_images, generator=generator)[:n]]
        found.append((t_E @ t_E - b_n.square().sum()) / (b_n.sum().square() - b_n.square().sum()))
    excess_B = torch.stack(found) - moments.mean_similarity
    z_B = excess_B / deviation_S
    p = {"normal": torch.special.erfc(z_B / 2**0.5) / 2, "Pearson III": skewed_tail(z_B, skewness_S.expand_as(z_B))}
    if n < FEW_IMAGES:
        pairs_PR = drawn_pairs(drawn_images(n_images, 0), v_NE.float(), along_N, moments)
        p["drawn"] = sampled_tail(b_n.expand(len(z_B), n), excess_B, pairs_PR)
    shares = "; ".join(
        f"{name} " + ", ".join(f"{float((p_B < limit).double().mean()) / limit:.2f}" for limit in LIMITS)
        for name, p_B in p.items()
    )
    n_eff = float(b_n.sum().square() / b_n.square().sum())
    skewness = f"{float(skewness_S):+.2f} (seen {float(z_B.pow(3).mean()):+.2f})"
    return f"{kind:14s} n {n:3d} n_eff {n_eff:5.1f} skewness {skewness}: {shares}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shuffles", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args()
    print("shares of p below", ", ".join(map(str, LIMITS)), "over these")
    for kind in ("no structure", "clusters", "few dimensions", "copies"):
        for n, heavy in ((5, False), (10, False), (20, False), (100, False), (20, True), (40, True)):
            print(calibration(kind, n, heavy, options.images, options.shuffles), flush=True)


if __name__ == "__main__":
    main()
