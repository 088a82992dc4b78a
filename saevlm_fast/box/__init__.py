"""What is in the box: the models and the scenes they know."""
