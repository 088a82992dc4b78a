"""Editing latents inside a tower, reading the answers, scoring them."""
