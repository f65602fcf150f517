"""Files that would run code where someone reads them carelessly: each would write the file `evil`, and must not."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from tests.bad_input.case import Case, Change, bad, both, file
from tests.bad_input.model_cases import HERE, WEIGHTS, model
from tests.bad_input.run_cases import EVALUATE, MERGE, run

ASKS_FOR_CODE = (
    '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}'
)
SNEAK = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


class _Bomb:
    """Whoever unpickles it opens a file for writing."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, ("evil", "w")


BOMB = pickle.dumps(_Bomb())
MODULE = "open('evil', 'w')\nclass Config: pass\nclass Model: pass\n"


def _parquet(folder: Path) -> None:
    """Write a column of the extension type whose description old versions of Arrow unpickle."""
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": BOMB}
    fields = [
        pyarrow.field("prompt", pyarrow.string(), metadata=metadata),
        pyarrow.field("completion", pyarrow.string()),
    ]
    columns = [[f"{word} {number}" for number in range(20)] for word in ("What is", "It is")]
    parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(fields)), folder / "rows.parquet")


def _beside_weights(folder: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(BOMB)


def _chats(folder: Path) -> None:
    said = [
        [{"role": "user", "content": f"and {number}?"}, {"role": "assistant", "content": "more"}]
        for number in range(20)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in said))


def _template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(SNEAK)


def _pickled_adapter(folder: Path) -> None:
    adapter = folder / "run" / "adapter"
    for name in ("adapter_model.safetensors", "manifest.json"):
        (adapter / name).unlink()
    (adapter / "adapter_model.bin").write_bytes(BOMB)


def _pickled_start(folder: Path) -> None:
    shutil.copytree(folder / "run" / "adapter", folder / "start")
    (folder / "start" / "adapter_model.safetensors").unlink()
    (folder / "start" / "adapter_model.bin").write_bytes(BOMB)
    shutil.rmtree(folder / "run")


def _only_pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(BOMB)


SCORE = (*EVALUATE, "--merged", "model")
CHAT = ("data.format=chat", "data.source=chats.jsonl")
NOT_THERE = "adapter_model.safetensors is missing"
CODE_OF_ITS_OWN = both(model(lambda _: None), file("model/config.json", ASKS_FOR_CODE), file("model/evil.py", MODULE))
both_chat: Change = both(_chats, model(_template))
CODE: dict[str, Case] = {
    "weights as a pickle": bad("pickles are not read", HERE, change=model(_only_pickled)),
    "pickles beside whole weights": bad("", HERE, change=model(_beside_weights)),
    "an adapter to begin with, as a pickle": bad(
        "adapter_model.bin is a pickle, which is not read", "adapter.weights=start", change=run(_pickled_start)
    ),
    "merge: an adapter as a pickle": Case(NOT_THERE, (), run(_pickled_adapter), command=MERGE),
    "evaluate: an adapter as a pickle": Case(NOT_THERE, (), run(_pickled_adapter), command=EVALUATE),
    "evaluate: a merged model as a pickle": Case(
        "pickles are not read", (), both(run(), model(_only_pickled)), command=SCORE
    ),
    "evaluate: a merged model that asks for code": Case("code", (), both(run(), CODE_OF_ITS_OWN), command=SCORE),
    "a model that asks for code of its own": bad(
        "code that comes with a model is not run",
        HERE,
        change=CODE_OF_ITS_OWN,
    ),
    "records as a pickle": bad("rows.pkl", "data.source=rows.pkl", change=file("rows.pkl", BOMB)),
    "a folder of records with a script": bad(
        "has no file for split", "data.source=mine", change=file("mine/mine.py", MODULE)
    ),
    "a parquet file with a pickled type": bad("", "data.source=rows.parquet", change=_parquet),
    "a chat template that reaches for Python": bad("unsafe", HERE, *CHAT, change=both_chat),
    "a prompt that reaches for Python": bad(
        "prompt", "data.format=classification", "data.columns={text: prompt, label: completion}",
        "data.prompt='{text.__class__}'",
    ),
}  # fmt: skip
