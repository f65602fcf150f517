"""Files and folders that are complete or absent; folders of the cache that are made once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glora_llm.atomic import cache_root, make_once, require_new, whole_folder, write_text
from glora_llm.errors import UserError

# The maker goes on when the other two have said that they wait, or have found the lock's file open for a while.
RACER = """
import logging, sys, time
from pathlib import Path
from glora_llm import atomic

log = Path(sys.argv[1])
atomic.WAIT_SECONDS = 0.05

class Waits(logging.Handler):
    def emit(self, record):
        (log / f"waits-{sys.argv[2]}").touch()

atomic.log.addHandler(Waits())

def make(folder):
    with (log / "made").open("a") as lines:
        lines.write("made\\n")
    (folder / "half").write_text("1")
    while len(list(log.glob("waits-*"))) < 2:
        time.sleep(0.01)
    (folder / "whole").write_text("2")

folder = atomic.make_once(atomic.cache_root() / "raced", make)
assert (folder / "whole").read_text() == "2"
print(folder)
"""


def test_of_three_processes_one_makes_and_two_wait(tmp_path: Path, cache: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    folders = {racer.communicate(timeout=300)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert folders == {str(cache / "raced")}
    assert (tmp_path / "made").read_text() == "made\n"


def test_a_maker_that_died_leaves_nothing_that_is_read(cache: Path) -> None:
    def dies(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        make_once(cache / "dies", dies)
    assert not (cache / "dies").exists()

    (cache / f".dies.{socket.gethostname()}-killed").mkdir()
    folder = make_once(cache / "dies", lambda folder: (folder / "whole").touch())
    assert [file.name for file in folder.iterdir()] == ["whole"]
    assert {path.name for path in cache.glob(".dies*")} == {".dies.lock"}


def test_a_made_folder_is_found_without_a_lock(cache: Path) -> None:
    make_once(cache / "there", lambda folder: (folder / "file").touch())
    (cache / ".there.lock").unlink()
    make_once(cache / "there", lambda folder: pytest.fail("made again"))
    assert not (cache / ".there.lock").exists()


def test_machines_whose_locks_do_not_meet_share_what_the_first_one_made(cache: Path) -> None:
    """The other machine began first and ends first: its temporary folder is left alone, its result counts."""
    theirs = cache / ".shared.node1-17"
    theirs.mkdir()
    (theirs / "whole").write_text("1")

    def make(folder: Path) -> None:
        (folder / "whole").write_text("2")
        theirs.rename(cache / "shared")

    folder = make_once(cache / "shared", make)
    assert (folder / "whole").read_text() == "1"
    assert {path.name for path in cache.glob(".shared*")} == {".shared.lock"}


def test_a_damaged_folder_is_made_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache / "damaged").mkdir()
    (cache / "damaged" / "half").touch()
    folder = make_once(
        cache / "damaged", lambda folder: (folder / "whole").touch(), lambda folder: (folder / "whole").exists()
    )
    assert [file.name for file in folder.iterdir()] == ["whole"]
    assert "is incomplete or damaged and is made again" in caplog.text


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write the cache folder .* GLORA_CACHE"):
        make_once(tmp_path / "file" / "x", lambda folder: None)


def test_cache_root_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLORA_CACHE")
    assert cache_root() == Path.home() / ".cache" / "glora_llm"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with whole_folder(folder) as place:
        (place / "first").touch()
    with pytest.raises(OSError, match="full"), whole_folder(folder) as place:
        (place / "half").touch()
        raise OSError("the disk is full")
    assert [path.name for path in folder.iterdir()] == ["first"]
    with whole_folder(folder) as place:
        (place / "second").touch()
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_get_the_mode_that_the_user_wants(tmp_path: Path) -> None:
    """Safetensors writes for the owner alone, which nobody asked for; a file that is shared with others keeps its."""
    (tmp_path / "theirs").touch(mode=0o600)
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "model") as place:
            save_file({"a": torch.zeros(1)}, place / "model.safetensors")
            os.link(tmp_path / "theirs", place / "linked")
        assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o640
        assert (tmp_path / "theirs").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "1")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "2\ud800")
    assert (tmp_path / "a.json").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    require_new(tmp_path / "new")
    with pytest.raises(UserError, match="exists already; name a new folder"):
        require_new(tmp_path)


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    gone, alive = subprocess.Popen(["true"]), os.getppid()
    gone.wait()
    for pid in (gone.pid, alive):
        (tmp_path / f".writing-a.json.{pid}").touch()
    write_text(tmp_path / "a.json", "1")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", f".writing-a.json.{alive}"}
