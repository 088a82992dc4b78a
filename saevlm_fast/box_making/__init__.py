"""How the models in the box were made; not needed to use them."""
