"""Files that are whole or absent, never half-written; JSON and checksums. And what surrounds every
program: the paths that it is given, what it prints to, and how it ends."""
import codecs
import errno
import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path


class InputError(ValueError):
    """Something given to the program cannot be used: the message says what, why, and the fix."""


@contextmanager
def atomic_write(path):
    """Yields a temporary path in the same folder, at which to write a file or make a folder.
    Afterwards that takes the name `path`, whole and on disk. After an error it is removed, and what
    was at `path` is untouched. An OSError that names no file gets the name `path`."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for written in temporary, *temporary.rglob("*"):
            fsync(written)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.errno and str(error.filename) in ("None", str(temporary)):
            error.filename = str(path)
        raise
    finally:
        remove(temporary)


def fsync(path):
    """Waits until a file, or the list of names in a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:       # others come from file systems that have no fsync (of folders)
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(handle)


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def explain(path, error):
    """Why a file cannot be used: Git LFS left a pointer in its place, or what the error says."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "it is a Git LFS pointer, not the file: git lfs pull"
    return str(error)


print_once = lru_cache(print)


def remove(path):
    """Removes a file, a link or a whole folder. What cannot be removed stays, with a note."""
    shutil.rmtree(path, ignore_errors=True)                       # does nothing to the other two
    with suppress(OSError):
        path.unlink()
    if os.path.lexists(path):
        print_once(f"note: {path} cannot be removed, and stays")


def read_json(path):
    """The object in a JSON file, as a dict. Raises InputError where it is missing or damaged."""
    path = Path(path)
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}" if path.parent.is_dir()
                         else f"there is no folder {path.parent}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read ({explain(path, error)})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} cannot be read (it holds a {type(found).__name__}, "
                         "not an object)")
    return found


def to_json(value, indent=None):
    """JSON of a value. NaN and infinity, which JSON does not have, become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(value, indent=indent)


def write_json(path, value):
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(value, indent=2) + "\n", "utf-8")


def sha256_file(path):
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def run_program(main, stopped="stopped"):
    """Calls main(arguments). Exits with a sentence where something given to the program cannot be
    used or the system refuses, with `stopped` after Ctrl-C, and silently if nobody reads on."""
    for name in "stdin", "stdout", "stderr":
        if getattr(sys, name) is None:         # closed: the next file opened would take its place
            setattr(sys, name, open(os.devnull, "r+"))
            os.set_inheritable(getattr(sys, name).fileno(), True)
    # what the terminal has no character for is escaped as in JSON
    codecs.register_error("json", lambda error: (
        json.dumps(error.object[error.start:error.end])[1:-1], error.end))
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="json", line_buffering=True)
    sys.stderr = Output(sys.stderr)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError) as error:
        # what still waits to be printed would fail again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # of `| head`, unless an Output has taken care of that
        if not isinstance(error, BrokenPipeError) or isinstance(sys.stdout, Output):
            sys.exit(str(error))


def as_path(text):
    """A path of a command line. After `=`, shells do not know that ~ is the home folder."""
    return os.path.expanduser(text) if text else sys.exit(
        "an empty path names nothing: give a file or a folder (an unset variable?)")


class Output:
    """A stream that may fail: its reader or terminal goes, its disk is full. What is written from
    then on is lost, and a run, if there is one, gets a stop request."""

    def __init__(self, stream, stop_request=None):
        self.stream, self.stop_request = stream, stop_request

    def write(self, text):
        try:
            print(text, end="", file=self.stream, flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.stop_request is not None:
                self.stop_request.failure = (
                    f"{self.stream.name} cannot be written ({error.strerror}), ")

    def __getattr__(self, name):
        return getattr(self.stream, name)
