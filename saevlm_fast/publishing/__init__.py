"""Trained SAEs for others: the model card, and the way to the Hub and back."""
