"""Set up the libraries before they are imported: memory that grows, and a quiet terminal (real warnings stay)."""

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Set what the libraries read when they are imported; call before torch, transformers or deepspeed are.

    Segments of GPU memory that can grow keep a model that is loaded and then divided from leaving holes that nothing
    fits into. A user's own setting of torch's allocator stays.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lora_bias=True.*")
    bars_on_terminals_only()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("glora_llm").setLevel(logging.INFO)
    # "Failed to load CPU gemm_4bit_forward from kernels-community": an optional speed-up of inference.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # DeepSpeed warns while it is imported where there is no GPU
    try:
        import deepspeed.utils
    finally:
        logging.disable(logging.NOTSET)
    deepspeed.utils.logger.setLevel(logging.ERROR)


def bars_on_terminals_only() -> None:
    """Keep progress bars of libraries out of log files (transformers shows one while it reads a GGUF file).

    tqdm reads the variable when it is imported; bars that say themselves when they appear go by what they say.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
