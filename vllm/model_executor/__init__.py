"""Networks: layers, models, and how their weights are read."""
