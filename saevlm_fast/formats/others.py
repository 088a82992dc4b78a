"""The formats of other libraries and releases, in the order in which they are tried: name, detect, read, files."""

from collections.abc import Callable

from saevlm_fast.formats import (
    gemma_scope,
    llamascopium,
    openai,
    overcomplete,
    prisma,
    releases,
    visaebench,
    vision_releases,
)
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.source import Source

OTHERS: tuple[tuple[str, Callable[[Source], bool], Callable[[Source], PlainSAE], str], ...] = (
    # By names of files and settings.
    ("llamascopium", llamascopium.detect, llamascopium.read, llamascopium.FILES),
    ("lm_saes", llamascopium.detect_old, llamascopium.read_old, llamascopium.OLD_FILES),
    ("prisma", prisma.detect, prisma.read, prisma.FILES),
    ("gemma_scope", gemma_scope.detect, gemma_scope.read, gemma_scope.FILES),
    ("visaebench", visaebench.detect, visaebench.read, visaebench.FILES),
    (
        "clip_topk_sae",
        vision_releases.detect_clip_topk,
        vision_releases.read_clip_topk,
        vision_releases.CLIP_TOPK_FILES,
    ),
    ("qwen_scope", releases.detect_qwen, releases.read_qwen, releases.QWEN_FILES),
    # By names of tensors in one file.
    ("openai", openai.detect, openai.read, openai.FILES),
    ("overcomplete", overcomplete.detect, overcomplete.read, overcomplete.FILES),
    ("msae", vision_releases.detect_msae, vision_releases.read_msae, vision_releases.MSAE_FILES),
    (
        "clip_scope",
        vision_releases.detect_clip_scope,
        vision_releases.read_clip_scope,
        vision_releases.CLIP_SCOPE_FILES,
    ),
    (
        "batch_topk_reference",
        vision_releases.detect_reference,
        vision_releases.read_reference,
        vision_releases.REFERENCE_FILES,
    ),
    ("goodfire", releases.detect_goodfire, releases.read_goodfire, releases.GOODFIRE_FILES),
    ("deepseek", releases.detect_deepseek, releases.read_deepseek, releases.DEEPSEEK_FILES),
)
