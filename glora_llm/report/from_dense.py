"""Print what a dense model lost when it was made smaller: before, by truncated SVD alone, and after training."""

from glora_llm.plan.run_folder import RunFolder


def print_losses(folder: RunFolder) -> None:
    """Print the held-out losses of the dense model (or teacher), of the start and of the end, and their ratios."""
    summary = folder.summary()
    before = summary.get("dense") or summary.get("teacher") or {}
    split = "test" if "test/loss" in before else "validation"
    reference = "dense model" if "dense" in summary else "teacher"  # which may be quantised
    stages = {
        reference: before,
        "truncated SVD alone": summary.get("at_start", {}),
        "trained on": summary.get(split, {}),
    }
    dense = before.get(f"{split}/loss")
    if dense is None:
        return
    print(f"held-out loss ({split} rows), nats a token")
    for name, scores in stages.items():
        loss = scores.get(f"{split}/loss")
        if loss is not None:
            print(f"  {name:22s} {loss:8.4f}   {loss / dense:.3f} x the {reference}'s")
