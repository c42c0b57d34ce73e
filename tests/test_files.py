"""files.py: what is written is whole or absent, and no program dies of its terminal."""
import errno
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from files import (
    InputError,
    Output,
    as_path,
    atomic_write,
    read_json,
    remove,
    sha256_file,
    write_json,
)


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    """A full disk, or Ctrl-C in the middle of a write, would leave half a file."""
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half a fi")
        raise ZeroDivisionError
    assert read_json(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("content, says", [
    (None, "has no x.json"), ("{", "cannot be read"), ("[]", "it holds a list"),
    ("\udc80", "cannot be read")])
def test_a_missing_or_damaged_file_is_named(tmp_path, content, says):
    """A KeyError deep in the program would not say which file to look at."""
    if content is not None:
        (tmp_path / "x.json").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=says):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match="no folder"):
        read_json(tmp_path / "absent" / "x.json")


def test_json_and_checksum_survive_the_way_to_disk(tmp_path):
    """Text in another encoding than UTF-8 would change names of sources on Windows."""
    write_json(tmp_path / "x.json", {"naïve": [1, 2.5, None]})
    assert json.loads((tmp_path / "x.json").read_bytes().decode()) == {"naïve": [1, 2.5, None]}
    write_json(tmp_path / "x.json", {"score": [1, math.nan, -math.inf]})     # neither is JSON
    assert read_json(tmp_path / "x.json") == {"score": [1, None, None]}
    assert sha256_file(tmp_path / "x.json") != sha256_file(__file__)


def test_a_file_system_need_not_flush_folders(tmp_path, monkeypatch):
    """VirtualBox's shares, CIFS and some FUSE answer EINVAL, and no checkpoint could be saved. A
    disk that loses bytes is another matter."""
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "x.json", {"step": 1})
    assert read_json(tmp_path / "x.json") == {"step": 1}

    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "x.json", {"step": 2})
    assert read_json(tmp_path / "x.json") == {"step": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_named(tmp_path):
    """The error of a write() names no file, and that of an open() a temporary one: nobody knew
    which disk was full."""
    with pytest.raises(OSError, match=r"No space left on device: '.*/x.json'$"):
        with atomic_write(tmp_path / "x.json"), open("/dev/full", "w") as file:
            file.write("{}")
            file.flush()
    with pytest.raises(OSError, match=r"No such file or directory: '.*/nowhere/x.json'$"):
        write_json(tmp_path / "nowhere/x.json", {})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_removed_stays_with_one_note(tmp_path, monkeypatch, capsys):
    """An old checkpoint that was moved to a larger disk and linked, or that another process has
    open, ended a run after each save."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in "link", "never there":
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["elsewhere"] and (tmp_path / "elsewhere/file").exists()

    def busy(*_, **__):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        for _ in range(2):
            remove(tmp_path / "elsewhere")
    assert capsys.readouterr().out == f"note: {tmp_path}/elsewhere cannot be removed, and stays\n"
    remove(tmp_path / "elsewhere")
    assert not list(tmp_path.iterdir())


def test_paths_of_a_command_line(monkeypatch):
    """--out=~/x made a folder called "~", and "$UNSET" tokenized the current folder."""
    monkeypatch.setenv("HOME", "/home/me")
    assert [as_path(text) for text in ("~/x", "~", "x~", "s3://a/~", "./~")] == [
        "/home/me/x", "/home/me", "x~", "s3://a/~", "./~"]
    with pytest.raises(SystemExit, match="names nothing"):
        as_path("")


def test_output_that_fails_is_a_stop_request(tmp_path):
    """A run that is piped into `head`, whose terminal is closed or whose disk is full, lost all
    steps since its last save."""
    read, write = os.pipe()
    os.close(read)
    for stream in open(write, "w"), open("/dev/full", "w"):
        request = SimpleNamespace(failure="")
        output = Output(stream, request)
        output.write("")
        assert not request.failure
        for _ in range(2):
            print("step 1", file=output)
        assert f"{stream.name} cannot be written" in request.failure
        stream.close()                              # does not fail again


PROGRAM = """
import os, sys
from files import InputError, run_program
def main(argv):
    if argv == ["print"]:
        print('{"text": "caf\\xe9 \\u20ac \\U0001f600 \\udce9"}')
        print("\\u4e2d", file=sys.stderr)
        print("x\\n" * 99999)
    if argv == ["open"]:
        print(open(os.devnull).fileno(), file=sys.stderr)
    if argv == ["child"]:
        os.execvp(sys.executable, [sys.executable, "-c", "import sys; print(sys.stderr)"])
    if argv == ["input"]:
        raise InputError("no \\u4e2d")
    if argv == ["system"]:
        open("nowhere/x")
    if argv == ["stop"]:
        raise KeyboardInterrupt
run_program(main, "stopped, as asked")
"""


@pytest.mark.parametrize("shell, status, out, err", [
    ("PYTHONIOENCODING=ascii $RUN print | tail -c +1 | head -1", 0,
     r'{"text": "caf\u00e9 \u20ac \ud83d\ude00 \udce9"}' + "\n", "\\u4e2d\n"),
    ("$RUN print 2>/dev/null | head -c 1", 0, "{", ""),
    ("$RUN print 2>/dev/null >&-", 0, "", ""),
    ("$RUN print 2>&1 >/dev/full | tail -1", 1, "[Errno 28] No space left on device\n", ""),
    ("$RUN print 2>/dev/full | tail -2", 0, "x\n\n", ""),
    ("$RUN open 2>&-", 0, "", ""), ("$RUN open <&- >&-", 0, "", "3\n"),
    ("$RUN child 2>&- | grep -c stderr", 0, "1\n", ""),
    ("$RUN input", 1, "", "no \u4e2d\n"),
    ("$RUN system", 1, "", "[Errno 2] No such file or directory: 'nowhere/x'\n"),
    ("$RUN stop", 130, "", "\nstopped, as asked\n")])
def test_how_programs_begin_and_end(shell, status, out, err, tmp_path):
    """Where standard error was closed, messages went to standard output or into a file that was
    opened later; a terminal without UTF-8, a reader that has gone and a full disk were tracebacks.
    What is escaped is still JSON."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        ["bash", "-c", f"{shell}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True,
        encoding="utf-8", cwd=tmp_path, env=os.environ | {
            "RUN": f"{sys.executable} program.py", "PYTHONIOENCODING": "utf-8",
            "PYTHONPATH": str(Path(__file__).parents[1])})
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)
