"""How good an SAE is, how sure that is, and what the same numbers are for things that cannot have learned."""
