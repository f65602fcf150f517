"""The names in adapter.targets and adapter.modules_to_save, compared with those of a model's modules."""

from collections.abc import Collection

from glora_llm.errors import UserError, nearest
from glora_llm.schema import AdapterSection


def require_names(section: AdapterSection, modules: Collection[str], linears: Collection[str]) -> None:
    """Check that each name of a list is the name of a module, or its end; PEFT is content when one of them matches.

    Args:
        modules: full names of all modules.
        linears: last parts of the names of the linears, for the message.

    Raises:
        UserError: naming the nearest part of a name, and the linears.
    """
    parts = {part for name in modules for part in name.split(".") if not part.isdecimal()}
    for key in ("targets", "modules_to_save"):
        wanted = getattr(section, key)
        for target in wanted if isinstance(wanted, list) else ():
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                raise UserError(
                    f"adapter.{key}: '{target}' matches no module.{nearest(target, parts)} {name_linears(linears)}"
                )


def name_linears(linears: Collection[str]) -> str:
    """Return a sentence that lists the last parts of the names of the linears."""
    return f"Linears of this model: {', '.join(sorted(linears))}; or all-linear."
