"""A checkpoint is there whole or not at all; whatever is broken in one is named, and the one before it serves."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from glora_llm.errors import UserError
from glora_llm.training import checkpoint

FILES = ("state.safetensors", "trainer.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
         checkpoint.MANIFEST)  # fmt: skip
NAMES = ["layer.down", "layer.shift"]


def state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes = {"layer.down": (3, 4), "layer.shift": (5,)}
    return {
        f"{kind}/{name}": torch.randn(shape, generator=generator)
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }


def save_adapter(folder: Path) -> None:
    folder.mkdir()
    save_file({"down": torch.ones(3, 4)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "GLORA_LLM"}))


def write(root: Path, step: int) -> Path:
    return checkpoint.write(root, step, state(step), trainer(step), save_adapter)


def trainer(step: int) -> dict[str, Any]:
    return {"step": step, "seconds": 1.5, "applied": step, "data_digest": "0" * 64}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoints", 7)
    assert folder == tmp_path / "checkpoints" / "step-7"
    assert sorted(contents(folder)) == sorted(FILES)
    assert checkpoint.fault(folder) is None and checkpoint.newest(tmp_path / "checkpoints") == folder
    tensors, values = checkpoint.read(folder, NAMES)
    assert values == trainer(7)
    expected = state(7)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_tensors_that_are_not_contiguous_are_written(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4).t()
    folder = checkpoint.write(tmp_path, 1, {"master/x": value}, {}, save_adapter)
    assert torch.equal(checkpoint.read(folder, ["x"])[0]["master/x"], value)


def test_the_newest_counts_by_number_and_other_folders_do_not_count(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        write(tmp_path, step)
    for other in ("step-x", "step-99.bak", "best", ".writing-step-50"):
        (tmp_path / other).mkdir()
    (tmp_path / "step-77").write_text("a file")
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["step-10", "step-9", "step-2"]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-10"
    assert checkpoint.newest(tmp_path / "absent") is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(bit: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1 << bit
        path.write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "emptied": empty,
    "zeroed": zero,
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_older_checkpoint_serves(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = write(tmp_path, 3), write(tmp_path, 6)
    DAMAGES[damage](newer / name)
    problem = checkpoint.fault(newer)
    assert problem is not None and problem.startswith(name)
    with caplog.at_level(logging.WARNING, logger="glora_llm"):
        assert checkpoint.newest(tmp_path) == older
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"passed over broken checkpoint {newer}: {problem}"


@pytest.mark.parametrize("name", [name for name in FILES if name != checkpoint.MANIFEST])
def test_one_flipped_bit_is_named(name: str, tmp_path: Path) -> None:
    older, newer = write(tmp_path, 3), write(tmp_path, 6)
    for bit in range(8):
        flip(bit)(newer / name)
        assert checkpoint.fault(newer) == f"{name} differs from what was written (sha256)"
        assert checkpoint.newest(tmp_path) == older
        flip(bit)(newer / name)
        assert checkpoint.newest(tmp_path) == newer


def test_any_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    """The manifest has no checksum of its own: a flipped name, number or digest contradicts the files."""
    folder = write(tmp_path, 3)
    manifest = folder / checkpoint.MANIFEST
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            manifest.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            assert isinstance(checkpoint.fault(folder), str), (place, bit)
    manifest.write_bytes(whole)
    assert checkpoint.fault(folder) is None


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"state.safetensors": 3}'])
def test_a_manifest_of_another_shape_is_a_fault(content: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    (folder / checkpoint.MANIFEST).write_text(content)
    assert isinstance(checkpoint.fault(folder), str)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not valid JSON"),
        (b'{"step": ', "is not valid JSON"),
        (bytes(range(256)), "cannot be read as text"),
        (b"[]", "holds a list"),
        (b"[" * 10_000, "nest too deep"),
        (b"{}", "has no step"),
        (json.dumps(trainer(4) | {"seconds": "x"}).encode(), "has no seconds"),
        (json.dumps(trainer(5)).encode(), "is of step 5"),
    ],
)
def test_a_trainer_json_that_was_changed_with_its_checksum(
    content: bytes, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = write(tmp_path, 2), write(tmp_path, 4)
    (newer / "trainer.json").write_bytes(content)
    (newer / checkpoint.MANIFEST).unlink()
    checkpoint.write_manifest(newer)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path) == older
    assert f"{newer}: trainer.json" in caplog.text and said in caplog.text


def test_a_manifest_reaches_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    place = folder / checkpoint.MANIFEST
    manifest = json.loads(place.read_text())
    (tmp_path / "secret").write_bytes((folder / "trainer.json").read_bytes())
    for name in ("../secret", str(tmp_path / "secret")):
        place.write_text(json.dumps(manifest | {name: manifest["trainer.json"]}))
        assert "does not list" in (checkpoint.fault(folder) or "")


def test_none_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (3, 6):
        truncate(write(tmp_path, step) / "trainer.json")
    with caplog.at_level(logging.WARNING, logger="glora_llm"):
        assert checkpoint.newest(tmp_path) is None
    assert len(caplog.records) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing_and_the_older_ones(error: BaseException, tmp_path: Path) -> None:
    write(tmp_path, 3)
    before = contents(tmp_path)

    def fail(folder: Path) -> None:
        save_adapter(folder)
        raise error

    for step in (3, 6):  # 3: a step that is there already
        with pytest.raises(type(error)):
            checkpoint.write(tmp_path, step, state(step), {}, fail)
        assert contents(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_step_written_again_replaces_the_old(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / ".writing-step-3").mkdir()
    (tmp_path / ".writing-step-3" / "half").write_text("left by a killed run")
    folder = checkpoint.write(tmp_path, 3, state(4), trainer(3), save_adapter)
    assert checkpoint.fault(folder) is None and sorted(contents(folder)) == sorted(FILES)
    assert torch.equal(checkpoint.read(folder, NAMES)[0]["master/layer.down"], state(4)["master/layer.down"])


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_rotate_keeps_the_newest_and_removes_leftovers(keep: int, tmp_path: Path) -> None:
    for step in (2, 10, 4, 8):
        write(tmp_path, step)
    (tmp_path / ".writing-step-12").mkdir()
    (tmp_path / ".writing-step-12" / "state.safetensors").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.rotate(tmp_path, keep)
    expected = [f"step-{step}" for step in (10, 8, 4, 2)][:keep]
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == expected
    assert {path.name for path in tmp_path.iterdir()} == {*expected, "notes.txt"}
    assert all(checkpoint.fault(folder) is None for folder in checkpoint.checkpoints(tmp_path))


def test_rotate_does_not_count_a_folder_without_manifest(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step)
    (tmp_path / "step-6" / checkpoint.MANIFEST).unlink()
    checkpoint.rotate(tmp_path, keep=2)
    assert {"step-2", "step-4"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([*NAMES, "layer.up"], "it lacks ['layer.up'] and has nothing more"),
        (NAMES[:1], "it lacks nothing and has ['layer.shift'] more"),
        (["layer.down", "other"], "it lacks ['other'] and has ['layer.shift'] more"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(names: list[str], said: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    with pytest.raises(UserError) as caught:
        checkpoint.read(folder, names)
    assert str(folder) in str(caught.value) and said in str(caught.value)
    assert "Use the recipe it was written with, or another output.dir" in str(caught.value)


@pytest.mark.parametrize("has_adapter", [True, False])
def test_the_size_of_a_checkpoint_is_what_its_tensors_take(has_adapter: bool, tmp_path: Path) -> None:
    numbers = torch.ones(100_000)

    def save_adapter(folder: Path) -> None:
        folder.mkdir()
        save_file({"adapter": numbers}, folder / "adapter_model.safetensors")

    states = {f"{state}/x": numbers.clone() for state in ("master", "exp_avg", "exp_avg_sq")}
    folder = checkpoint.write(tmp_path, 1, states, {}, save_adapter if has_adapter else None)
    written = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert checkpoint.size(100_000, has_adapter) == pytest.approx(written, rel=1e-3)


def test_too_little_space_names_free_and_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root: Any = tmp_path / "not" / "there" / "yet"
    checkpoint.require_space(root, each=16_000, keep=2)
    with pytest.raises(UserError) as caught:
        checkpoint.require_space(root, each=16 * 10**18, keep=2)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} has ") and " GB free; 3 checkpoints (output.keep 2, and one" in message
    assert "the final weights need 64000000000.00 GB" in message and not root.exists()
    with pytest.raises(OSError, match=r"has .* GB free, and 16000000000.00 GB are needed"):
        checkpoint.require_room(root, 16 * 10**18)


def test_what_is_there_already_needs_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, each = 1_000_000, 100_000  # and 200,000 of small files each: a checkpoint and the final weights are 600,000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(UserError, match=r"1\.0 MB free; 3 checkpoints .* need 1\.2 MB"):
        checkpoint.require_space(tmp_path, each, keep=2)
    for step in (2, 4):
        write(tmp_path, step)
    checkpoint.require_space(tmp_path, each, keep=2)
