"""The merge at the end of training, which a killed launch may have left half done."""

import gc
import shutil
from pathlib import Path

import torch

from glora_llm.files.json_file import read_object
from glora_llm.merge.command import merge_run, score_merged
from glora_llm.merge.published import REPORT
from glora_llm.plan.genome import deployed
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.trained_weights import trained_weights


def merge_after_training(folder: RunFolder) -> None:
    """Merge a run that has ended into RUN/merged, or do what an earlier launch that was killed has left undone of it.

    Raises:
        UserError, CheckFailed: as `merge_run`.
    """
    gc.collect()  # what training held in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    out, quantize = folder.path / "merged", folder.recipe().merge.quantize
    if out.exists() and _lacks_twin(out):
        print(f"{out} was to be quantised, and an earlier launch ended before that: it is merged again", flush=True)
        shutil.rmtree(out)
    if not out.exists():
        merge_run(folder.path, out)
    elif quantize == "none" and "test_merged" not in folder.summary():
        recipe, _ = deployed(folder, trained_weights(folder).weights)
        score_merged(folder, recipe, out)


def _lacks_twin(out: Path) -> bool:
    """Tell whether a merged folder holds the dense model that was to be replaced by its nf4 twin, and was not."""
    report, config, advice = out / REPORT, out / "config.json", f"Delete {out}: it is merged again."
    if not report.is_file() or not config.is_file():
        return False
    values = read_object(report, advice)
    is_dense = "quantization_config" not in read_object(config, advice)
    return is_dense and "not_lossless" in values and "requantised" not in values
