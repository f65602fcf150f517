"""Tasks: rows, batches, objective and scores. The rest of a run is the same for every task."""
