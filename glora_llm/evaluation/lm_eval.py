"""`python -m glora_llm.evaluation.lm_eval ...`: the command line of lm-eval, where PEFT knows GLoRA adapters.

lm-eval loads an adapter by `--model_args pretrained=BASE,peft=ADAPTER` through PEFT, which learns of this method when
it is imported. Everything after the name of the module is lm-eval's own.
"""

import glora_llm.glora  # noqa: F401 - registers the method with PEFT
from glora_llm.errors import UserError


def main() -> None:
    """Run lm-eval with the arguments of this process.

    Raises:
        UserError: when lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError(f"lm-eval is not installed ({error}): pip install 'lm_eval[hf]'") from error
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"{error}") from None
