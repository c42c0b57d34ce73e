"""Files that are whole or absent, never half-written; JSON and checksums."""
import json
import os
import shutil
from contextlib import contextmanager, suppress
from hashlib import file_digest
from pathlib import Path


class InputError(ValueError):
    """Something given to the program cannot be used: the message says what, why, and the fix."""


@contextmanager
def atomic_write(path):
    """Yields a temporary path in the same folder, at which to write a file or make a folder.
    Afterwards that takes the name `path`, whole and on disk. After an error it is removed, and what
    was at `path` is untouched."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def fsync(path):
    """Waits until a file, or the list of names in a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def explain(path, error):
    """Why a file cannot be used: Git LFS left a pointer in its place, or what the error says."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "it is a Git LFS pointer, not the file: git lfs pull"
    return str(error)


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
