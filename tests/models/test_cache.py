import subprocess
import sys
import time
from pathlib import Path

import pytest

from glora_llm.errors import UserError
from glora_llm.models.cache import cache_root, made_once

RACER = """
import sys, time
from pathlib import Path
from glora_llm.models.cache import made_once

def make(folder):
    with Path(sys.argv[1]).open("a") as log:
        log.write("made\\n")
    (folder / "half").write_text("1")
    time.sleep(0.5)
    (folder / "whole").write_text("2")

folder = made_once("raced", make)
assert (folder / "whole").read_text() == "2"
print(folder)
"""


def test_two_processes_make_once(tmp_path: Path, cache: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path / "log")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert folders == {str(cache / "raced")}
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_maker_that_died_leaves_nothing_that_is_read(cache: Path) -> None:
    def dies(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        made_once("dies", dies)
    assert not (cache / "dies").exists()

    (cache / ".dies.tmpkilled").mkdir()
    folder = made_once("dies", lambda folder: (folder / "whole").touch())
    assert [file.name for file in folder.iterdir()] == ["whole"]
    assert not list(cache.glob(".dies.tmp*"))


def test_a_made_folder_is_found_without_a_lock(cache: Path) -> None:
    made_once("there", lambda folder: (folder / "file").touch())
    (cache / ".there.lock").unlink()
    began = time.monotonic()
    made_once("there", lambda folder: pytest.fail("made again"))
    assert time.monotonic() - began < 1 and not (cache / ".there.lock").exists()


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"Cannot write the cache folder .* GLORA_CACHE"):
        made_once("x", lambda folder: None)


def test_cache_root_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLORA_CACHE")
    assert cache_root() == Path.home() / ".cache" / "glora_llm"
