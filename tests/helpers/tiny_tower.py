"""A small CLIP vision tower with random weights in transformers layout, and folders of small photos for it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

N_BLOCKS, WIDTH, PROJECTED, N_TOKENS = 3, 16, 12, 17  # 32-pixel images in patches of 8, and a CLS token


def save_clip(directory: Path) -> Path:
    """config.json, model.safetensors and preprocessor_config.json of a whole CLIP model."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1,
            "vocab_size": 50, "max_position_embeddings": 8}  # fmt: skip
    vision = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": N_BLOCKS,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTED))
    for parameter in model.parameters():  # the library's own initialisation gives nearly the same row for every image
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


def save_photos(directory: Path, n_images: int, n_classes: int = 3) -> Path:
    """class_C/photo_NNN.png: smooth noise, so that images differ; returns the directory."""
    generator = np.random.default_rng(0)
    for i in range(n_images):
        folder = directory / f"class_{i % n_classes}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"photo_{i:03d}.png")
    return directory
