"""Scores on held-out rows: loss, perplexity, exact match, accuracy over label words."""
