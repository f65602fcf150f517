"""The text of evaluation.forgetting: what is read of it, and whether a recipe has a use for it."""

from glora_llm.errors import UserError
from glora_llm.schema import DataSection, Recipe

TOKENS = 256  # of a row


def text_section(source: str) -> DataSection:
    """Return the data section that reads a text in rows of 256 tokens; of an embedded one its test part."""
    split = "test" if source.startswith("embedded:") else "train"
    return DataSection(format="text", source=source, split=split, max_tokens=TOKENS, overlong="split", packing=True)


def check_other_text(recipe: Recipe) -> None:
    """Check that the text of evaluation.forgetting is there, and that the model gives likelihoods of texts.

    Raises:
        UserError: when it is not, or there is no such text.
    """
    from glora_llm.data.first_look import first_look

    if recipe.evaluation.forgetting is not None:
        require_language_model(recipe, recipe.data.format != "images" and recipe.head is None)
        first_look(text_section(recipe.evaluation.forgetting))


def require_language_model(recipe: Recipe, is_one: bool) -> None:
    """Check that evaluation.forgetting is asked of a language model.

    Raises:
        UserError: when `is_one` says that it is none.
    """
    if not is_one:
        what = f"a head ({recipe.head})" if recipe.head else f"data.format {recipe.data.format}"
        raise UserError(
            f"evaluation.forgetting is the loss of a language model on a text, and this is {what}: "
            "evaluation.forgetting=null takes it away."
        )
