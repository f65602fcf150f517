"""Text files that people write or programs leave behind, read with bounds and with messages that name the file."""
