"""A merged folder -> a GGUF file beside its report."""

import json
from pathlib import Path

from glora_llm.merge.published import REPORT
from glora_llm.models.gguf_writing import write_gguf

GGUF = "model.gguf"


def to_gguf(folder: Path) -> None:
    """Replace a merged model that was verified by its GGUF file, of the same values.

    The report of the merge stays, and says what the file is.
    """
    values = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    write_gguf(folder, folder / GGUF, folder.name.removeprefix(".merging-"))
    for file in folder.iterdir():
        if file.name not in (REPORT, GGUF):
            file.unlink()
    (folder / GGUF).chmod((folder / REPORT).stat().st_mode)
    values["gguf"] = {"file": GGUF, "bytes": (folder / GGUF).stat().st_size}
    (folder / REPORT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
