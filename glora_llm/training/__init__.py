"""The training loop on DeepSpeed: engine, loop, optimizer, checkpoints, metrics."""
