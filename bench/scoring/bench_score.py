"""The Monosemanticity Score: streamed and pairwise beside dense torch and the paper's double loop over pairs."""

import itertools
import time
from dataclasses import dataclass, replace

import pytest
import torch

from saevlm_fast.kernels.grouping import entry_rows, group_by_latent
from saevlm_fast.kernels.pairwise_similarity import pairwise_gram_sums, pairwise_sums
from saevlm_fast.scoring.monosemanticity import StreamedScore
from saevlm_fast.sparse_codes import SparseCodes

GOAL = {"clip-b32-x8": 1000.0}  # times the double loop's speed on CPU, N = 5000
# Times the speed of a double loop over blocks on CPU. Not raw neurons under rbf: there every pair needs its tile.
BLOCK_LOOP_GOAL = 5.0
GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Images:
    """Images with k of d_sae latents each, n_neurons raw activations and an embedding of width d_emb."""

    n_images: int
    d_sae: int
    n_neurons: int
    d_emb: int = 512
    k: int = 20

    @property
    def shape(self) -> dict[str, int]:
        return {"N": self.n_images, "d_sae": self.d_sae, "E": self.d_emb, "k": self.k}


IMAGES = {
    "smoke": Images(40, 96, 24, d_emb=8, k=4),
    "clip-b32-x8": Images(5000, 6144, 768),
    "clip-l14-x64": Images(50_000, 65_536, 1024),  # ImageNet's validation set
}


@pytest.fixture(params=IMAGES)
def case(request):
    return IMAGES[request.param]


@pytest.fixture
def codes(case, device):
    return make_codes(case, device)


def make_codes(case, device):
    """(acts, latents) [N, K], latents ascending, low ones far more often than high ones; embeddings [N, E] float32."""
    generator = torch.Generator().manual_seed(0)
    popular_NK = torch.rand(case.n_images, case.k, generator=generator).square() * (case.d_sae - case.k)
    latents_NK = popular_NK.long().sort(1).values + torch.arange(case.k)
    acts_NK = torch.rand(case.n_images, case.k, generator=generator) + 0.1
    emb_NE = torch.randn(case.n_images, case.d_emb, generator=generator) + 0.5
    return acts_NK.to(device), latents_NK.to(device), emb_NE.to(device)


def streamed(acts_NK, latents_NK, emb_NE, d_sae):
    score = StreamedScore(d_sae, device=emb_NE.device)
    score.update(SparseCodes.from_flat(acts_NK, latents_NK, None, d_sae), emb_NE)
    return score.result().ms


def pairwise(acts_NK, latents_NK, emb_NE, d_sae, similarity="cosine"):
    order_M, offsets_S1 = group_by_latent(latents_NK, None, d_sae)
    images_M = entry_rows(latents_NK, None)[order_M]
    num_S, den_S = pairwise_gram_sums(acts_NK.flatten()[order_M], images_M, offsets_S1, emb_NE, similarity)
    return num_S / den_S


def dense_columns(acts_NK, latents_NK, d_sae, columns=None):
    """Float64 activations [N, S] of all latents, or of some."""
    place_S = torch.full((d_sae,), -1, device=acts_NK.device)
    columns = torch.arange(d_sae, device=acts_NK.device) if columns is None else columns
    place_S[columns] = torch.arange(len(columns), device=acts_NK.device)
    rows_M, entries_M = torch.nonzero(place_S[latents_NK] >= 0, as_tuple=True)
    dense_NS = acts_NK.new_zeros(len(acts_NK), len(columns), dtype=torch.float64)
    dense_NS[rows_M, place_S[latents_NK[rows_M, entries_M]]] = acts_NK[rows_M, entries_M].double()
    return dense_NS


def dense_closed_form(acts_NS, emb_NE):
    """(|sum r u|^2 - sum r^2) / ((sum r)^2 - sum r^2) over dense activations: linear in N, two passes over [N, S]."""
    unit_NE = torch.nn.functional.normalize(emb_NE.double(), dim=1)
    low_S, high_S = acts_NS.aminmax(dim=0)
    r_NS = (acts_NS - low_S) / (high_S - low_S)
    squares_S = r_NS.square().sum(0)
    return ((r_NS.T @ unit_NE).square().sum(1) - squares_S) / (r_NS.sum(0).square() - squares_S)


def dense_pairs(acts_NS, emb_NE):
    """The similarity matrix [N, N] whole, and two products with it."""
    unit_NE = torch.nn.functional.normalize(emb_NE.double(), dim=1)
    low_S, high_S = acts_NS.aminmax(dim=0)
    r_NS = (acts_NS.double() - low_S) / (high_S - low_S)
    num_S = (r_NS * ((unit_NE @ unit_NE.T).triu_(1) @ r_NS)).sum(0)
    return 2 * num_S / (r_NS.sum(0).square() - r_NS.square().sum(0))


def double_loop(acts_NS, emb_NE, rows=None):
    """The paper's way: pair by pair in Python, all latents at a time. Its copies to the device are left out."""
    unit_NE = torch.nn.functional.normalize(emb_NE, dim=1)
    r_NS = acts_NS / acts_NS.amax(0)
    num_S, den_S = torch.zeros_like(r_NS[0]), torch.zeros_like(r_NS[0])
    for i in range(len(r_NS)) if rows is None else rows:
        for j in range(i + 1, len(r_NS)):
            weight_S = r_NS[i] * r_NS[j]
            num_S += weight_S * (unit_NE[i] @ unit_NE[j])
            den_S += weight_S
    return num_S / den_S


def block_loop(acts_NS, emb_NE, similarity="cosine", block=1024):
    """What one writes in torch: a double loop over blocks of images, each pair of blocks once, float64."""
    unit_NE = torch.nn.functional.normalize(emb_NE.double(), dim=1) if similarity == "cosine" else emb_NE.double()
    sqnorm_N = unit_NE.square().sum(1)
    r_NS = acts_NS.double() - acts_NS.amin(0)
    num_S, den_S = torch.zeros_like(r_NS[0]), torch.zeros_like(r_NS[0])
    for i in range(0, len(r_NS), block):
        r_iS = r_NS[i : i + block]
        for j in range(i, len(r_NS), block):
            r_jS = r_NS[j : j + block]
            s_ij = unit_NE[i : i + block] @ unit_NE[j : j + block].T
            if similarity == "rbf":
                distance_ij = sqnorm_N[i : i + block, None] + sqnorm_N[j : j + block] - 2 * s_ij
                s_ij = (-distance_ij / emb_NE.shape[1]).exp()
            if i == j:
                s_ij = s_ij.triu(1)
                den_S += (r_iS * (torch.ones_like(s_ij).triu(1) @ r_iS)).sum(0)
            else:
                den_S += r_iS.sum(0) * r_jS.sum(0)
            num_S += (r_iS * (s_ij @ r_jS)).sum(0)
    return num_S / den_S


def extrapolated_double_loop(acts_NS, emb_NE, n_rows=8):
    """Seconds that the double loop would take, from n_rows of its rows, evenly spaced: their pairs' share of all."""
    n_images = len(acts_NS)
    rows = [(2 * i + 1) * n_images // (2 * n_rows) for i in range(n_rows)]
    double_loop(acts_NS[:10], emb_NE[:10])
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    float(double_loop(acts_NS, emb_NE, rows)[0])  # reading a number waits for the device
    seconds = time.perf_counter() - start
    pairs = sum(n_images - 1 - i for i in rows)
    return seconds * (n_images * (n_images - 1) / 2) / pairs, n_rows


def assert_same_scores(scores, expected):
    """Where ours is defined: below two images the dense closed form gives noise. On a GPU pairs are float32."""
    scores, expected = scores.cpu(), expected.cpu()
    defined = scores.isfinite()
    assert int(defined.sum()) > 0
    tolerance = 1e-4 if GPU else 1e-8
    torch.testing.assert_close(scores[defined], expected[defined], atol=tolerance, rtol=tolerance)


def work(case, n_operations):
    return {"GFLOP/s": 1e-9 * n_operations, "images/s": case.n_images}


@pytest.mark.parametrize("impl", ["dense", "streamed", "pairwise"])
def test_score(measure, benchmark, goal, request, case, codes, memory, impl):
    """All latents of an SAE from its sparse codes, cosine. The dense way gets dense codes, made beforehand."""
    acts_NK, latents_NK, emb_NE = codes
    ours = {"streamed": lambda: streamed(*codes, case.d_sae), "pairwise": lambda: pairwise(*codes, case.d_sae)}
    ways = {name: (way, {"images/s": case.n_images}) for name, way in ours.items()}
    dense_bytes = 4 * 8 * case.n_images * case.d_sae
    if dense_bytes < 0.7 * memory:
        acts_NS = dense_columns(acts_NK, latents_NK, case.d_sae)
        ways["dense"] = (
            lambda: dense_closed_form(acts_NS, emb_NE),
            work(case, 2 * case.n_images * case.d_sae * case.d_emb),
        )
    if impl not in ways:
        pytest.skip(f"four dense float64 [N, d_sae] need {dense_bytes / 2**30:.0f} GiB of {memory / 2**30:.0f} GiB")

    def check():
        some = torch.arange(0, case.d_sae, max(1, case.d_sae // 256), device=emb_NE.device)
        expected = dense_closed_form(dense_columns(acts_NK, latents_NK, case.d_sae, some), emb_NE)
        assert_same_scores(ours[impl]()[some.cpu()], expected)

    measure("score", impl, ways, check=check, shape=case.shape, dtype="float64 sums")
    if impl == "streamed" and "dense" in ways and not benchmark.disabled:
        loop_seconds, n_rows = extrapolated_double_loop(acts_NS.float(), emb_NE)
        ratio = loop_seconds / benchmark.stats.stats.median
        benchmark.extra_info |= {
            "double_loop_over_this": round(ratio, 1),
            "double_loop_seconds": round(loop_seconds, 3),
            "double_loop_note": f"extrapolated by pairs from {n_rows} of {case.n_images} rows",
        }
        name = request.node.callspec.params["case"]
        if emb_NE.device.type == "cpu" and name in GOAL:
            goal(f"streamed score at {name} over the double loop", ratio, GOAL[name])


@pytest.mark.parametrize("impl", ["double_loop", "streamed", "pairwise"])
def test_score_of_100_images(measure, case, codes, impl):
    """Few enough images that the double loop runs to its end."""
    acts_NK, latents_NK, emb_NE = (t[:100] for t in codes)
    args = acts_NK, latents_NK, emb_NE, case.d_sae
    acts_NS = dense_columns(acts_NK, latents_NK, case.d_sae)
    calls = {
        "double_loop": lambda: double_loop(acts_NS.float(), emb_NE),
        "streamed": lambda: streamed(*args),
        "pairwise": lambda: pairwise(*args),
    }
    measure(
        "score of 100 images",
        impl,
        {name: (call, {"images/s": len(emb_NE)}) for name, call in calls.items()},
        check=lambda: assert_same_scores(calls[impl](), double_loop(acts_NS, emb_NE.double())),
        shape=case.shape | {"N": len(emb_NE)},
        dtype="float64 sums",
        reference="double_loop",
    )


@pytest.mark.parametrize("impl", ["dense", "streamed", "pairwise"])
def test_raw_score(measure, case, planted_images, device, memory, impl):
    """Raw neurons, the paper's baseline: every image has an activation for every neuron. Cosine."""
    acts_NK, emb_NE = (t.to(device) for t in planted_images(case.n_images, case.n_neurons, case.d_emb))
    n_pairs = case.n_images**2 / 2
    if impl != "streamed":  # all pairs: two gigabytes and a second at 5,000 images, a hundred times that at 50,000
        n_bytes, n_operations = 16 * case.n_images**2, 4 * n_pairs * (case.d_emb + case.n_neurons)
        if n_bytes > 0.7 * memory or n_operations > (1e15 if device.type == "cuda" else 1e12):
            pytest.skip(f"{n_bytes / 2**30:.0f} GiB of similarities, {1e-12 * n_operations:.1f} Tflop: too much here")

    def fast():
        if impl == "pairwise":
            low_K = acts_NK.amin(0)
            num_K, den_K = pairwise_sums(acts_NK.double() - low_K, emb_NE)
            return num_K / den_K
        score = StreamedScore(case.n_neurons, device=device)
        score.update(acts_NK, emb_NE)
        return score.result().ms

    pairs = work(case, 2 * n_pairs * (case.d_emb + case.n_neurons))
    measure(
        "raw neurons' score",
        impl,
        {
            "streamed": (fast, {"images/s": case.n_images}),
            # On a CPU the kernel gets by with fewer operations than pairs.
            "pairwise": (fast, pairs if GPU else {"images/s": case.n_images}),
            "dense": (lambda: dense_pairs(acts_NK, emb_NE), pairs),
        },
        check=lambda: assert_same_scores(fast(), dense_pairs(acts_NK, emb_NE)),
        shape={"N": case.n_images, "K": case.n_neurons, "E": case.d_emb},
        dtype="float64 sums",
    )


@pytest.mark.parametrize("impl", ["block_loop", "pairwise"])
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("kind", ["codes", "raw"])
def test_pairs(measure, goal, request, case, planted_images, device, kind, similarity, impl):
    """Every pair by its similarity, whatever the similarity: the kernel beside a torch double loop over blocks.

    Of sparse codes the loop gets 2048 latents at most, dense, so that it ends: the kernel scores as many.
    """
    n_images, n_latents = min(case.n_images, 5000), min(case.d_sae, 2048)
    if kind == "codes":
        acts_NK, latents_NK, emb_NE = make_codes(replace(case, n_images=n_images, d_sae=n_latents), device)
        acts_NS = dense_columns(acts_NK, latents_NK, n_latents)
    else:
        acts_NS, emb_NE = (t.to(device) for t in planted_images(n_images, case.n_neurons, case.d_emb))

    def kernel():
        if kind == "codes":
            return pairwise(acts_NK, latents_NK, emb_NE, n_latents, similarity)
        num_S, den_S = pairwise_sums(acts_NS.double() - acts_NS.amin(0), emb_NE, similarity)
        return num_S / den_S

    ways = {"pairwise": kernel, "block_loop": lambda: block_loop(acts_NS, emb_NE, similarity)}
    ratios = measure(
        f"all pairs, {similarity}, {'sparse codes' if kind == 'codes' else 'raw neurons'}",
        impl,
        {name: (way, {"images/s": n_images}) for name, way in ways.items()},
        check=lambda: assert_same_scores(ways[impl](), ways["block_loop"]()),
        shape={"N": n_images, "S": acts_NS.shape[1], "E": case.d_emb},
        dtype="float64",
        reference="block_loop",
    )
    name = request.node.callspec.params["case"]
    if device.type == "cpu" and name != "smoke" and "block_loop" in ratios and (kind, similarity) != ("raw", "rbf"):
        goal(f"pairs of {kind}, {similarity}, over a loop over blocks", ratios["block_loop"], BLOCK_LOOP_GOAL)


DENSE_PAIRS = {"N=10000, K=1024": Images(10_000, 0, 1024, 768), "N=20000, K=4096": Images(20_000, 0, 4096, 768)}


@pytest.mark.skipif(not GPU, reason="hours of a CPU")
@pytest.mark.parametrize("impl", ["block_loop", "pairwise"])
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("case", DENSE_PAIRS)
def test_dense_pairs(measure, device, case, similarity, impl):
    """Every pair of many images by raw neurons: the sums alone, of activations that are ready."""
    images = DENSE_PAIRS[case]
    generator = torch.Generator(device).manual_seed(0)
    acts_NK = torch.rand(images.n_images, images.n_neurons, device=device, generator=generator, dtype=torch.float64)
    emb_NE = torch.randn(images.n_images, images.d_emb, device=device, generator=generator) + 0.5

    def kernel():
        num_K, den_K = pairwise_sums(acts_NK, emb_NE, similarity)
        return num_K / den_K

    def loop():
        return block_loop(acts_NK, emb_NE, similarity, block=2048)

    n_operations = images.n_images**2 * (images.d_emb + images.n_neurons)
    measure(
        f"pair sums of raw neurons, {similarity}",
        impl,
        {"pairwise": (kernel, work(images, n_operations)), "block_loop": (loop, work(images, n_operations))},
        check=lambda: torch.testing.assert_close(kernel(), loop(), atol=1e-6, rtol=1e-6),
        shape={"N": images.n_images, "K": images.n_neurons, "E": images.d_emb},
        dtype="float64",
        reference="block_loop",
    )


BY_N = {"smoke": 100, "N=2000": 2000, "N=10000": 10_000, "N=50000": 50_000, "N=200000": 200_000, "N=1281167": 1_281_167}
POOL = 65_536  # different images; more are these again, so that making them takes no time and no memory
MOST_IMAGES = {"double_loop": 50_000, "pairwise": 10_000, "streamed": 1_281_167}


@pytest.mark.parametrize("impl", MOST_IMAGES)
@pytest.mark.parametrize("case", BY_N)
def test_score_by_n(benchmark, environment, peak_memory, device, case, impl):
    """Seconds against the number of images, 65,536 latents; the last is ImageNet's training set. Peak memory beside."""
    n_images = BY_N[case]
    if n_images > MOST_IMAGES[impl]:
        pytest.skip(f"{impl}: minutes to years")
    images = Images(min(n_images, POOL), 96 if case == "smoke" else 65_536, 0, k=4 if case == "smoke" else 20)
    acts_NK, latents_NK, emb_NE = make_codes(images, device)

    def streamed_in_chunks():
        score = StreamedScore(images.d_sae, device=device)
        chunks = itertools.cycle(zip(*(t.split(POOL if GPU else 4096) for t in (acts_NK, latents_NK, emb_NE))))
        while score.n_images < n_images:
            left = n_images - score.n_images
            acts_nK, latents_nK, emb_nE = (t[:left] for t in next(chunks))
            score.update(SparseCodes.from_flat(acts_nK, latents_nK, None, images.d_sae), emb_nE)
        return score.result().ms

    part = min(n_images, 60)  # of the double loop, which is pair by pair: the rest follows
    dense_nS = dense_columns(acts_NK[:part], latents_NK[:part], images.d_sae).float()
    ways = {
        "streamed": streamed_in_chunks,
        "pairwise": lambda: pairwise(acts_NK, latents_NK, emb_NE, images.d_sae),
        "double_loop": lambda: double_loop(dense_nS, emb_NE[:part]),
    }
    benchmark.group = f"score by number of images | {case}"
    peak_memory()  # from here
    benchmark.pedantic(ways[impl], rounds=3 if n_images <= 50_000 else 1, warmup_rounds=int(n_images <= 50_000))
    info = {"operation": "score by number of images", "case": case, "impl": impl, "dtype": "float64 sums"}
    benchmark.extra_info |= info | environment() | {"shape": images.shape | {"N": n_images}}
    benchmark.extra_info["peak_bytes"] = peak_memory()
    if impl == "double_loop" and not benchmark.disabled:
        share = n_images * (n_images - 1) / (part * (part - 1))
        benchmark.extra_info["seconds_of_all"] = benchmark.stats.stats.median * share
