"""Files that are never half-written, and nothing of killed processes stays for ever."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from keras_taylor.support.files import AtomicFile, scratch_folder

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform == "win32", reason="no way to ask for a process"),
]

KILLED = """
import os, pathlib, signal, sys
from keras_taylor.support.files import AtomicFile, scratch_folder
target, folder = pathlib.Path(sys.argv[1]), scratch_folder()
pathlib.Path(folder.name, "model.keras").write_text("a copy")
with AtomicFile(target) as draft:
    draft.path.write_text("half")
    if len(sys.argv) > 2:
        target.rename(draft.path.with_name(draft.path.name + ".old"))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(target, temporary, *words):
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(target), *words]
    assert subprocess.run(command, env=environment).returncode < 0


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def write(target):
    with AtomicFile(target) as draft:
        draft.path.write_text("whole")
        draft.move_to(target)


def test_the_next_run_removes_what_a_killed_one_left(tmp_path, temporary):
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "small.keras"
    others = tmp_path / "out" / f".unfinished-elsewhere-{os.getpid()}-12345678-small.keras"
    others.write_text("of a process on another machine, which may still run")
    killed(target, temporary)
    assert len(os.listdir(target.parent)) == 2 and len(os.listdir(temporary)) == 1
    with AtomicFile(target) as running:  # of this process, which runs
        running.path.write_text("half")
        write(target)
        assert sorted(os.listdir(target.parent)) == sorted([others.name, running.path.name, target.name])
    assert target.read_text() == "whole"
    with scratch_folder() as folder:
        assert os.listdir(temporary) == [pathlib.Path(folder).name]
    assert os.listdir(temporary) == []


@pytest.mark.slow
def test_what_was_set_aside_by_a_killed_run_comes_back(tmp_path, temporary):
    target = tmp_path / "served"
    target.mkdir()
    killed(target, temporary, "set aside")
    assert not target.exists()
    with AtomicFile(target):
        assert target.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["served", "temporary"]
