"""The whole way on what is in the box, against the known truth."""
