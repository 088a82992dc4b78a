"""SAE-V (arXiv 2502.17514): which latents join text and image, and which image-text pairs fit together."""
