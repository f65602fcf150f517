"""Compare adapter methods on one recipe at equal cost, each at its own best learning rate."""
