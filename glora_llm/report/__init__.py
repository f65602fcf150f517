"""What a finished run tells people: figures, drawn from results alone, without a model or a display."""
