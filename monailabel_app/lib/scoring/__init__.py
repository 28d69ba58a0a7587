"""How good ``learned`` is, by the labels that people submitted."""
