"""Keeps the libraries' chatter off the terminal, so that what is printed is ours; warnings that matter stay."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call before transformers, bitsandbytes or deepspeed are imported."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lora_bias=True.*")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("glora_llm").setLevel(logging.INFO)
    # "Failed to load CPU gemm_4bit_forward from kernels-community": an optional speed-up of inference.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    import deepspeed.utils

    deepspeed.utils.logger.setLevel(logging.ERROR)
