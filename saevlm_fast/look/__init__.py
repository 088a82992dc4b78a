"""What a latent sees: contact sheets, names, and pages that open offline."""
