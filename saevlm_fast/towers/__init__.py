"""Vision towers of transformers, open_clip and timm, and the text towers beside them: loading, hook points, tokens."""
