"""What a latent is worth and sees: the Monosemanticity Score, top images, nearest words."""
