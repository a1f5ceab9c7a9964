"""How the cost of a training step grows, and how well a model of it predicts what it has not seen."""
