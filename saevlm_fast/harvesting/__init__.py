"""From images to stores of activations or codes."""
