"""CLIP's own steering: which latents change what a CLIP says of an image, and which make it read words instead."""
