"""Named places in the code where a test, or a careful user, lets a run fail: killed, without disk space, told to end.

    GLORA_FAILPOINT=checkpoint.after_trainer glora-llm train --recipe tiny_cpu

kills the process with SIGKILL where the first manifest would be written; `NAME:3` at the third passage, `NAME:3+` at
every one from the third on. A third part says what happens instead: `NAME:1:enospc` (also `eio`, `erofs`) raises the
error that a full, broken or read-only disk would; `term`, `int`, `usr1` and `stop` send that signal here. Several
are separated by commas. Without the variable a place does nothing. docs/reliability.md says what tests do with them.
"""

import errno
import os
import signal
from typing import NamedTuple

from glora_llm.errors import UserError

VARIABLE = "GLORA_FAILPOINT"
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
SIGNALS |= {"usr1": signal.SIGUSR1, "stop": signal.SIGSTOP}

POINTS = {
    # one small file that is written under another name and renamed (recipe.yaml, summary.json and others)
    "file.before_write": "nothing was written",
    "file.before_sync": "the text may be in memory only",
    "file.before_rename": "the new text is on the disk under its temporary name",
    "file.after_rename": "the file is replaced",
    # one folder that is filled under another name and renamed: a checkpoint, the final weights, a merged model
    "folder.before_make": "what a killed process left under the temporary name is gone",
    "folder.after_make": "the temporary folder is empty",
    "folder.before_sync": "all files are written, perhaps in memory only",
    "folder.between_syncs": "one file more is on the disk",
    "folder.after_sync": "all files are on the disk",
    "folder.before_set_aside": "an older folder of the same name is about to be set aside",
    "folder.after_set_aside": "there is no folder of the name now",
    "folder.before_rename": "the folder is about to appear",
    "folder.after_rename": "the folder is there; the rename may be in memory only",
    "folder.before_clean": "the rename is on the disk; leftovers are not removed",
    # a checkpoint
    "checkpoint.before_gather": "master weights and moments are with their processes",
    "checkpoint.before_tensors": "nothing is written",
    "checkpoint.after_tensors": "state.safetensors is written",
    "checkpoint.after_adapter": "adapter/ is written, where there is one",
    "checkpoint.after_trainer": "trainer.json is written",
    "checkpoint.after_manifest": "manifest.json is written",
    "checkpoint.after_write": "the checkpoint is there; older ones are not deleted",
    "rotation.before_delete": "an old checkpoint is about to be deleted",
    "rotation.in_delete": "the old checkpoint has lost its first file",
    "rotation.after_delete": "one old checkpoint is deleted",
    "checkpoint.after_rotation": "older checkpoints are deleted",
    # an optimizer step
    "step.before": "nothing of the step is done",
    "step.before_forward": "a micro batch is about to be computed",
    "step.before_backward": "its loss is known",
    "step.between_micro_batches": "some gradients are accumulated",
    "step.before_optimizer": "all gradients are accumulated",
    "step.after_optimizer": "the weights are changed",
    # what is logged
    "metrics.before_write": "a line of metrics.jsonl is about to be written",
    "metrics.after_write": "it is written, and TensorBoard not",
    "tensorboard.before_write": "numbers are about to go to TensorBoard",
    # scores
    "evaluation.before_batch": "a batch of validation or test rows is about to be scored",
    "evaluation.after": "all rows are scored, and nothing is written down",
    # the end of training
    "result.before": "all steps are trained, and no final weights are written",
    "result.after_weights": "the weights are written under the temporary name, without manifest",
    "result.after": "the final weights are there, and summary.json does not say so",
    "result.after_summary": "summary.json says that training has ended",
    "model.after_weights": "the weights of a model that was trained as a whole are written under the temporary name",
    # a search
    "search.before_scores": "a round of candidates is about to be scored",
    "search.before_journal": "a score is known, and not in the journal",
    "search.after_journal": "the score is in the journal",
    "search.before_archive": "the search is over, and genome.json is not written",
    "search.after_genome": "genome.json is written, archive and pictures are not",
    "search.after_archive": "all is written, and summary.json does not say so",
    # a merge
    "merge.before": "nothing is written",
    "merge.before_shard": "a file of merged weights is about to be written",
    "merge.after_shards": "all weights are written, their index is not",
    "merge.before_verify": "the model is written, and not compared",
    "merge.before_publish": "it is verified, and has a temporary name",
    "merge.after_publish": "the merged model is there",
    # a folder of the cache: prepared data, embedded models
    "cache.before_make": "a folder of the cache is about to be made",
    "cache.before_rename": "it is made, and has a temporary name",
}


class Failpoint(NamedTuple):
    """One part of the variable.

    Args:
        name: of POINTS.
        first: the passage at which it acts, from 1.
        always: it acts at the later ones too.
        action: of ERRORS or SIGNALS.
    """

    name: str
    first: int
    always: bool
    action: str


passages: dict[str, int] = {}  # of this process so far, of the names that the variable has


def parse(text: str) -> list[Failpoint]:
    """Return the failpoints that a value of the variable asks for.

    Raises:
        UserError: when a name or an action is unknown, or a number is none.
    """
    found = []
    for part in filter(None, text.split(",")):
        name, count, action, *rest = [*part.split(":"), "", ""][: max(3, part.count(":") + 1)]
        number = (count or "1").removesuffix("+")
        action = action or "kill"
        if name not in POINTS or action not in {*ERRORS, *SIGNALS} or rest or not number.isdecimal() or not int(number):
            raise UserError(
                f"{VARIABLE} has '{part}'; expected NAME[:COUNT[:ACTION]] with a name of glora_llm/failpoints.py, a "
                f"number from 1 on (or 3+), and one of {', '.join([*SIGNALS, *ERRORS])}."
            )
        found.append(Failpoint(name, int(number), count.endswith("+"), action))
    return found


def reach(name: str) -> None:
    """Pass a named place: nothing happens, unless the environment variable says so.

    Raises:
        OSError: when the variable asks for it here.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return
    if name not in POINTS:
        raise KeyError(name)
    armed = [point for point in parse(text) if point.name == name]
    if armed:
        passages[name] = passages.get(name, 0) + 1
    for point in armed:
        if passages[name] == point.first or (point.always and passages[name] > point.first):
            _act(point)


def _act(point: Failpoint) -> None:
    if point.action in ERRORS:
        number = ERRORS[point.action]
        raise OSError(number, f"{os.strerror(number)} (failpoint {point.name})")
    os.kill(os.getpid(), SIGNALS[point.action])
