"""How the weights move: parameter groups and the learning-rate schedule."""
