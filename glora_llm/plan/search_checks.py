"""Reject a search that a recipe has no supernet, rows or measure for."""

from glora_llm.errors import UserError
from glora_llm.schema import Recipe, SearchSection


def check_search(recipe: Recipe) -> None:
    """Check that a recipe has what a search needs.

    Raises:
        UserError: when it is no supernet, or has no validation rows.
    """
    if not recipe.adapter.is_supernet:
        raise UserError(
            "A search needs a supernet, and this recipe trains fixed paths: set adapter.paths=sample and train, or "
            "take `search` away (search=null)."
        )
    if recipe.adapter.method == "noah" and recipe.search:
        _check_noah_search(recipe.search)
    if recipe.data.format == "images" and recipe.search and recipe.search.metric == "label_accuracy":
        raise UserError("search.metric label_accuracy is of label words; of images it is exact_match (their accuracy).")
    if recipe.data.validation is None:
        raise UserError("A search scores candidates on validation rows, never on test rows: set data.validation.")


def _check_noah_search(search: SearchSection) -> None:
    """Check that a search needs nothing that only GLoRA's slots have."""
    if search.strategy == "additive":
        raise UserError(
            "search.strategy additive takes the first-order importance of every choice, which is computed of GLoRA's "
            "slots alone: set search.strategy=evolution (NOAH's own) or random."
        )
    if search.limit != "parameters":
        raise UserError(
            f"search.limit {search.limit} is measured of linears with GLoRA's slots alone, and adapter.method is noah: "
            "set search.limit=parameters."
        )
