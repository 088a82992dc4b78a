"""saevlm-fast: sparse autoencoders for vision-language models on Triton kernels (arXiv 2504.02821)."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the Triton kernels stand beside this package (the fixed top level kernels/), in a wheel inside it.
# The guard is one of our own files: Hugging Face ships a distribution that is also named `kernels`.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "topk_encode.py").is_file():
    __path__.append(str(_checkout))
