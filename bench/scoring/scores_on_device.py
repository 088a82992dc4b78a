"""The Monosemanticity Score on a device, pass by pass: `python -m bench.scoring.scores_on_device --output FILE.json`.

Raw neurons; codes streamed in small and in large chunks (a pool of images again and again, so that the data fits);
both passes of the trusted score; and `score` with an SAE that encodes. Each pass is run once before it is timed, and
its scores are held against the same pass in one chunk, or on the CPU. What differs fails; the others go on, and the
exit status is 1.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.helpers import cases
from bench.helpers.arguments import positive
from saevlm_fast.config.sae import SAEConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import StreamedScore, score
from saevlm_fast.scoring.second_pass import SecondPass
from saevlm_fast.sparse_codes import SparseCodes

SMALL, LARGE = 4096, 65536  # images of a chunk
ROUNDS = 3
CLOSE, FAR_SHARE = 1e-6, 1e-2  # of scores whose codes are chosen again: near ties may come out differently


class Data:
    """Seeded: codes [N, 20] of a pool of images, embeddings, raw neurons; on the device."""

    def __init__(self, options: argparse.Namespace):
        generator = torch.Generator().manual_seed(0)
        n, k = min(options.images, LARGE), min(20, options.latents)
        popular_NK = torch.rand(n, k, generator=generator).square() * (options.latents - k)
        self.n_latents, self.device = options.latents, torch.device(options.device)
        self.latents_NK = (popular_NK.long().sort(1).values + torch.arange(k)).to(self.device)
        self.acts_NK = (torch.rand(n, k, generator=generator) + 0.1).to(self.device)
        self.emb_NE = (torch.randn(n, options.width, generator=generator) + 0.5).to(self.device)
        self.raw_NK = torch.randn(min(5000, n), options.width, generator=generator)
        self.n_images = options.images

    def codes(self, rows: slice) -> SparseCodes:
        return SparseCodes.from_flat(self.acts_NK[rows], self.latents_NK[rows], None, self.n_latents)

    def chunks(self, size: int) -> list[slice]:
        """Rows of the pool, again and again, n_images in all."""
        pool, left, found = len(self.emb_NE), self.n_images, []
        while left > 0:
            stops = range(0, min(pool, left), size)
            found += [slice(start, min(start + size, pool, left)) for start in stops]
            left -= min(pool, left)
        return found

    def streamed(self, size: int, halves: bool = False) -> StreamedScore:
        taken = StreamedScore(self.n_latents, device=self.device, halves=halves)
        for rows in self.chunks(size):
            taken.update(self.codes(rows), self.emb_NE[rows])
        return taken


def neurons(data: Data) -> tuple[Callable[[], Tensor], Tensor]:
    """What is timed, and what it must give."""
    raw_NK, emb_NE = data.raw_NK.to(data.device), data.emb_NE[: len(data.raw_NK)]

    def on(acts_NK: Tensor, emb_NE: Tensor) -> Tensor:
        taken = StreamedScore(acts_NK.shape[1], device=acts_NK.device)
        taken.update(acts_NK, emb_NE)
        return taken.result().ms

    return lambda: on(raw_NK, emb_NE), on(data.raw_NK, emb_NE.cpu())


def small_chunks(data: Data) -> tuple[Callable[[], Tensor], Tensor]:
    return lambda: data.streamed(SMALL).result().ms, data.streamed(LARGE).result().ms


def large_chunks(data: Data) -> tuple[Callable[[], Tensor], Tensor]:
    return lambda: data.streamed(LARGE).result().ms, data.streamed(SMALL).result().ms


def both_passes(data: Data) -> tuple[Callable[[], Tensor], Tensor]:
    """Of the trusted score; it must give the one pass's scores."""

    def passes() -> Tensor:
        second = SecondPass(data.streamed(LARGE, halves=True))
        for rows in data.chunks(LARGE):
            second.update(data.codes(rows), data.emb_NE[rows])
        return second.result().scores.ms

    return passes, data.streamed(LARGE).result().ms


def with_an_sae(data: Data) -> tuple[Callable[[], Tensor], Tensor]:
    """`score` of raw rows, which an SAE encodes on the device."""
    d_in = data.raw_NK.shape[1]
    sae = SparseAutoencoder(SAEConfig.sized(d_in, expansion=8, k=min(20, d_in), architecture="topk"))
    sae.reset_parameters(0)
    rows, emb = Activations.from_tensor(data.raw_NK), Activations.from_tensor(data.emb_NE[: len(data.raw_NK)].cpu())
    expected = score(rows, emb, sae).ms
    there = sae.to(data.device)
    return lambda: score(rows, emb, there, device=data.device).ms, expected


PASSES = {
    "raw neurons": neurons,
    f"codes, chunks of {SMALL}": small_chunks,
    f"codes, chunks of {LARGE}": large_chunks,
    "both passes of the trusted score": both_passes,
    "score with an SAE": with_an_sae,
}


def measured(name: str, data: Data) -> list[float]:
    """Seconds of each of ROUNDS rounds. ValueError: its scores are not what they must be."""
    run, expected = PASSES[name](data)
    found = run()
    defined = expected.isfinite()
    far = (found - expected).abs()[defined] > CLOSE
    same = bool((found.isfinite() == defined).float().mean() > 1 - FAR_SHARE)
    allowed = FAR_SHARE if PASSES[name] is with_an_sae else 0.0
    require(
        same and len(far) > 0 and float(far.float().mean()) <= allowed,
        f"{name}: {int(far.sum())} of {len(far)} scores differ by more than {CLOSE:g}",
    )
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()  # a result is on the CPU: the device has been waited for
        seconds.append(time.perf_counter() - start)
    print(f"{name}: {1e3 * statistics.median(seconds):.2f} ms", flush=True)
    return seconds


def result(name: str, seconds: list[float], data: Data, options: argparse.Namespace) -> dict:
    few = PASSES[name] in (neurons, with_an_sae)
    n_images = len(data.raw_NK) if few else data.n_images
    info = {"operation": f"score on a device: {name}", "case": f"N {n_images}", "dtype": "float64", "impl": "ours"}
    info |= {"shape": {"N": n_images, "d_sae": options.latents, "E": options.width}}
    info |= {"images/s": n_images / statistics.median(seconds)} if seconds else {}
    return cases.line(info, seconds, options.device)


def main() -> None:
    parser = cases.parser_of(__doc__)
    parser.add_argument("--images", type=positive, default=1_281_167, help="of a stream")
    parser.add_argument("--latents", type=positive, default=65536)
    parser.add_argument("--width", type=positive, default=768, help="of embeddings and raw neurons")
    options = cases.parsed(parser)
    data = Data(options)
    cases.run_all(
        PASSES,
        partial(measured, data=data),
        partial(result, data=data, options=options),
        options.output,
        "passes agree",
    )


if __name__ == "__main__":
    main()
