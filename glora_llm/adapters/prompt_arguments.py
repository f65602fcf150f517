"""The arguments of methods that learn a prompt (see `adapters.prompts`), as a recipe gives them."""

from glora_llm.adapters.methods import METHODS
from glora_llm.errors import UserError, nearest
from glora_llm.schema import AdapterSection

PROMPT_METHODS = ("p_tuning", "p_tuning_v2", "prefix_tuning", "prompt_tuning")
PREFIXES = ("prefix_tuning", "p_tuning_v2")
STARTS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")  # of prompt_tuning


def prompt_length(section: AdapterSection) -> int:
    """Return the tokens of a method's prompt, which take room in the model's context; 0: it has none."""
    if section.method not in PROMPT_METHODS:
        return 0
    length = (dict(METHODS[section.method].arguments) | (section.peft or {}))["num_virtual_tokens"]
    return length if isinstance(length, int) else 0


def check_prompt(section: AdapterSection) -> None:
    """Check the length of a prompt, and that its keys and values are given as the method's name says.

    Raises:
        UserError: naming the argument.
    """
    given = section.peft or {}
    if prompt_length(section) < 1:
        raise UserError(
            f"adapter.peft.num_virtual_tokens is {given['num_virtual_tokens']}; a prompt has 1 token or more."
        )
    hidden = given.get("encoder_hidden_size")
    if isinstance(hidden, int) and hidden < 1:
        raise UserError(f"adapter.peft.encoder_hidden_size is {hidden}; the MLP of a prompt has 1 unit or more.")
    of_model = {"num_layers", "num_transformer_submodules"} | (set() if section.method in PREFIXES else {"token_dim"})
    for name in sorted(of_model & given.keys()):
        raise UserError(f"adapter.peft.{name} follows from the model: take it away.")
    start = given.get("prompt_tuning_init", "RANDOM")
    if start not in STARTS:
        raise UserError(
            f"adapter.peft.prompt_tuning_init '{start}' is unknown.{nearest(str(start), STARTS)} There is: "
            f"{', '.join(STARTS)}."
        )
    if section.method == "p_tuning_v2" and given.get("prefix_projection"):
        raise UserError(
            "adapter.method p_tuning_v2 learns keys and values themselves, and adapter.peft.prefix_projection gives "
            "them by an MLP: that is adapter.method=prefix_tuning."
        )
