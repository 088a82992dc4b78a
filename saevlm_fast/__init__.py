"""saevlm-fast: sparse autoencoders for vision-language models on Triton kernels (arXiv 2504.02821)."""

__version__ = "0.1.0"
