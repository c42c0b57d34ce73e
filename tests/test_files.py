"""files.py: what is written is whole or absent."""
import json
import math

import pytest

from files import InputError, atomic_write, read_json, sha256_file, write_json


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
