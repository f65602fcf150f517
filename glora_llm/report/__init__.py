"""Figures, tables and comparisons of finished runs, made from results alone, without a model or a display."""
