"""Give a merged model its final name once it is verified; set an unverified one aside."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from glora_llm.errors import CheckFailed, UserError
from glora_llm.failpoints import reach

REPORT = "merge_report.json"


@contextlib.contextmanager
def published(out: Path) -> Iterator[Path]:
    """Give a folder to write and to verify in; it gets the name `out` when both are done.

    A folder that was written and could not be verified, or failed, is kept as OUT.failed, with a report that says why.

    Raises:
        CheckFailed: when verification fails, or there is not enough memory for it.
    """
    working, failed = out.with_name(f".merging-{out.name}"), out.with_name(f"{out.name}.failed")
    shutil.rmtree(working, ignore_errors=True)
    try:
        reach("merge.before")
        yield working
    except BaseException as error:
        if not working.exists():
            raise
        shutil.rmtree(failed, ignore_errors=True)
        working.rename(failed)
        if not (failed / REPORT).exists():
            said = f"not verified: {type(error).__name__}: {error}"
            (failed / REPORT).write_text(json.dumps({"error": said}, indent=1) + "\n", encoding="utf-8")
        if isinstance(error, CheckFailed | UserError):
            raise type(error)(f"{error} It is in {failed}.") from None
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise CheckFailed(
                f"There was not enough memory to verify the result, which is in {failed}: {error} Free some memory and "
                "merge again; DS_ACCELERATOR=cpu keeps the merge off the GPU."
            ) from error
        error.add_note(f"What was written could not be verified. It is in {failed}.")
        raise
    reach("merge.before_publish")
    working.rename(out)
    reach("merge.after_publish")


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Let products of float32 matrices be float32 products on a GPU too, whatever training allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
