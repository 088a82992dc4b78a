"""Vision towers of transformers, open_clip and timm: `load_tower`.

Each library loads its own model and brings its own preprocessing; what is added here is where the blocks are, which
tokens come before the patches, and what `pooled` and `projection` are:

    family                      pooled                                    projection
    transformers CLIP           post-layernorm of CLS                     get_image_features
    transformers SigLIP(2)      attention-pool head = get_image_features  the same
    transformers DINOv2, 3      layernorm of CLS                          -
    transformers ViT            pooler if the checkpoint has one, else    -
                                layernorm of CLS
    vision tower in a LLaVA     as its family; SigLIP mostly headless     - (SigLIP with a head: the same as pooled)
    open_clip VisionTransformer CLS or mean after ln_post                 encode_image, not normalised
    open_clip timm towers       the trunk's output                        encode_image, not normalised
    timm                        pre-logits                                -

Of other families of transformers pooled is their pooler_output; those without one (I-JEPA, ViT-MSN, ViT-MAE, InternViT,
RADIO, and towers all of whose patches go to a language model) have no such point. Of a Swin, ResNet or ConvNeXt pooled
is the pooled feature map; in open_clip's ResNets an attention pool makes the projection of it. XCiT's and CaiT's class
token comes after the blocks, so at these they have patches alone.

Where a processor cuts an image into tiles, the tower is given the whole image, in one (Mllama's in its first tile).
What is special about families of transformers is in towers/families.py, how blocks hold tokens in towers/forms.py.
"""

from collections.abc import Callable

import torch
from torch import nn

from saevlm_fast.errors import check_kind, require
from saevlm_fast.runtime import loading, own_defaults, resolve_device
from saevlm_fast.towers.from_open_clip import load_open_clip, open_clip_anatomy
from saevlm_fast.towers.from_timm import load_timm, timm_anatomy
from saevlm_fast.towers.from_transformers import load_transformers, transformers_anatomy, vision_part
from saevlm_fast.towers.hub import one_line_errors
from saevlm_fast.towers.tower import Anatomy, Tower

SPECS = "hf:NAME_OR_DIR (tiny-clip, tiny-llava: in the box), open_clip:ARCH/PRETRAINED_OR_FILE, timm:NAME[:FILE]"


@loading()
@own_defaults()
def load_tower(spec: str, device: torch.device | str = "cpu", on_message: Callable[[str], None] = print) -> Tower:
    """Loads a tower (see the module's docstring) in float32.

    Args:
        spec: hf:NAME_OR_DIR, open_clip:ARCH/PRETRAINED_OR_FILE or timm:NAME[:FILE]. FILE: .safetensors, or .pt, .pth
            and .bin, read with weights_only.
        on_message: told, in one line, before anything is downloaded.

    Raises:
        ValueError: in one line: an unknown model, weights that are missing from the file, no preprocessing, no network
            (with the layout of files that works without), a model that is no plain vision transformer.
    """
    check_kind("spec", spec, str, f"one of {SPECS}")
    device = resolve_device(device)
    prefix, _, name = spec.partition(":")
    loaders = {"hf": load_transformers, "open_clip": load_open_clip, "timm": load_timm}
    require(prefix in loaders and name != "", f"model: {spec!r} is not one of {SPECS}")
    with one_line_errors(spec):
        return loaders[prefix](name, spec, device, on_message)


def find_anatomy(model: nn.Module) -> Anatomy:
    """Of a model already loaded: the vision tower in a LLaVA, CLIP or SigLIP of transformers, or of open_clip; or it.

    Raises:
        ValueError: a model of another library, or one whose vision part is no plain vision transformer.
    """
    kind = type(model).__name__
    libraries = {ancestor.__module__.partition(".")[0] for ancestor in type(model).__mro__}
    if "open_clip" in libraries:
        return open_clip_anatomy(getattr(model, "visual", model), kind)
    if "timm" in libraries:
        return timm_anatomy(model, kind)
    require("transformers" in libraries, f"model: {kind} is not a model of transformers, open_clip or timm")
    return transformers_anatomy(vision_part(model), kind)
