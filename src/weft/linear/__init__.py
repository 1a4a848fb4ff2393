"""How a compressed model stores and multiplies its matrices: one file a kind; with an underscore, what they share."""
