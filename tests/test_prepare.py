"""Proofs of prepare.py: what is tokenized decodes to itself, other programs agree on every id, and
bad input is refused whole."""
import ast
import datetime
import decimal
import gzip
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from test_tokenizer import AWKWARD, TEXT, folder, model  # noqa: F401 (fixtures)

import documents
import prepare
from data import Source
from documents import hash_to_unit
from files import InputError
from tokenizer import load_tokenizer

HERE = Path(__file__).parents[1]

def write_files(folder, **files):
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(
            content if isinstance(content, bytes) else content.encode())
    return [str(folder / name.replace("_", ".")) for name in files]


# --------------------------------------------------------------------------------------------------
# Files and documents

DOCUMENTS = [f"Document {k}: {'word ' * (k % 7)}{AWKWARD[k % len(AWKWARD)]}\n" for k in range(40)]


def as_rows(texts, key="text"):
    return "".join(json.dumps({key: text, "meta": {"set": f"S{k % 3}", "n": k}}) + "\n"
                   for k, text in enumerate(texts)).encode()


def as_parquet(texts, key="text"):
    out = io.BytesIO()
    rows = [{key: text, "meta": {"set": f"S{k % 3}", "n": k}} for k, text in enumerate(texts)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=17)
    return out.getvalue()


def in_frames(raw, n=3):
    """Several zstandard frames, as parallel compressors write them."""
    step = len(raw) // n + 1
    return b"".join(map(zstd.compress, [raw[i:i + step] for i in range(0, len(raw), step)]))


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tokenize(folder, *arguments, workers=1, command="tokenize"):
    """prepare.py tokenize, in this process; its exit status, or what it refuses with."""
    try:
        prepare.main([command, *map(str, arguments), f"--workers={workers}",
                      f"--tokenizer={folder / 'tokenizer.model'}"])
    except SystemExit as error:
        return error.code
    return 0


def read_source(out):
    """{split: its documents, decoded}, of a source; every one framed."""
    sp, found = prepare.load_tokenizer(out / "tokenizer.model"), {}
    info = json.loads((out / "source.json").read_text())
    for split in "train", "val":
        source = Source(out, split, 16)
        total = source.info["tokens"]
        ids = source.read(0, total) if total else np.array([], int)
        texts = np.split(ids, np.flatnonzero(ids == 1)[1:]) if total else []
        assert all(d[0] == 1 and d[-1] == 2 and (d == 2).sum() == 1 for d in texts)
        found[split] = [sp.decode(d[1:-1].tolist()) for d in texts]
        assert info[split] == {"documents": len(texts), "tokens": total,
                               "bytes": sum(len(text.encode()) for text in found[split])}
    return found


CONTAINERS = {
    "a.jsonl": as_rows, "a.json": as_rows, "a.jsonl.gz": lambda t: gzip.compress(as_rows(t)),
    "a.json.gz": lambda t: gzip.compress(as_rows(t[:9])) + gzip.compress(as_rows(t[9:])),
    "a.jsonl.zst": lambda t: in_frames(as_rows(t)), "a.parquet": as_parquet,
    "bom.jsonl": lambda t: b"".join(documents.BOM + as_rows(part).replace(b"\n", b"\r\n")
                                    for part in (t[:9], [], t[9:])) + b"\n"}


@pytest.mark.parametrize("name", CONTAINERS)
def test_documents_in_are_documents_out(name, folder, tmp_path):
    """Framing once wrong (only BOS, only EOS) cannot be mended later, nor a document lost."""
    put(tmp_path, {name: CONTAINERS[name](DOCUMENTS)})
    assert tokenize(folder, tmp_path / name, f"--out={tmp_path / 'out'}", "--val_fraction=0") == 0
    assert read_source(tmp_path / "out") == {"train": DOCUMENTS, "val": []}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "source.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "train_00000.bin", "val_00000.bin"]


def test_texts_are_documents(folder, tmp_path):
    """A .txt is one document, packed or not, whatever lines it has."""
    texts = [TEXT, "x", "\n\n two\r\nlines"]
    put(tmp_path, {"a.txt": documents.BOM + texts[0].encode(),
                   "b.txt.gz": gzip.compress(texts[1].encode()),
                   "c.txt.zst": zstd.compress(texts[2].encode())})
    assert tokenize(folder, tmp_path, f"--out={tmp_path / 'out'}", "--val_fraction=0") == 0
    assert read_source(tmp_path / "out")["train"] == texts


def test_folders_patterns_and_other_filesystems(folder, tmp_path, monkeypatch):
    """The order of files is the order of training: a listing as the disk has it would differ from
    machine to machine."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"in/b/2.txt": "b2", "in/a/10.jsonl": as_rows(["a10"]), "in/a/9.txt": "a9",
                   "in/.cache/x.txt": "no", "in/a/notes.md": "no", "z[1].txt": "z", "y1.txt": "y1",
                   "y2.txt": "y2", "d/1/train/a.txt": "d1", "d/2/train/b.txt": "d2",
                   "d/2/test/c.txt": "no"})
    with zipfile.ZipFile("far.zip", "w") as archive:
        archive.writestr("d/q.txt", "far q")
        archive.writestr("d/p.jsonl", as_rows(["far p"]).decode())
    assert tokenize(folder, "z[1].txt", "in", "y*.txt", "zip://d/*::far.zip", "d/*/train",
                    "--out=out", "--val_fraction=0") == 0
    assert read_source(tmp_path / "out")["train"] == [
        "z", "a10", "a9", "b2", "y1", "y2", "far p", "far q", "d1", "d2"]
    for given, words in [(["nowhere"], "no file nowhere"), (["q*.txt"], "no file"),
                         (["in/a/notes.md"], "can be read"), (["nothing://x"], "cannot be opened"),
                         (["y1.txt", "in", "y1.txt"], "y1.txt and y1.txt are the same file")]:
        assert words in tokenize(folder, *given, "--out=other")
        assert not Path("other").exists()
    monkeypatch.setattr(documents, "find_spec", lambda name: None)
    monkeypatch.setattr(documents, "zstd", None)
    put(tmp_path, {"a.parquet": b"", "a.jsonl.zst": b""})
    assert "pip install pyarrow" in tokenize(folder, "a.parquet", "--out=other")
    assert "pip install backports.zstd" in tokenize(folder, "a.jsonl.zst", "--out=other")


def test_links_are_followed(folder, tmp_path, monkeypatch):
    """Downloads are often folders of links; a corpus must not be left out, nor read twice."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {".cache/blobs/1": "one", ".cache/blobs/2": "two", ".cache/more/3.txt": "three"})
    Path(".cache/in").mkdir()
    for name, target in ("1.txt", "../blobs/1"), ("2.txt", "../blobs/2"), ("deep", "../more"):
        Path(".cache/in", name).symlink_to(target)
    Path(".cache/more/round").symlink_to("../in")
    for k, given in enumerate([".cache/in", ".cache/in/*"]):
        assert tokenize(folder, given, f"--out=out{k}", "--val_fraction=0") == 0
        assert read_source(tmp_path / f"out{k}")["train"] == ["one", "two", "three"]
        Path(".cache/more/round").unlink(missing_ok=True)
    said = tokenize(folder, ".cache/in", ".cache/more", "--out=out")
    assert ".cache/in/deep/3.txt and .cache/more/3.txt are the same file" in said
    Path(".cache/in/2.txt").unlink()
    Path(".cache/in/2.txt").symlink_to("../blobs/1")             # two names, as hubs store them
    said = tokenize(folder, ".cache/in", "--out=out")
    assert ".cache/in/1.txt and .cache/in/2.txt are the same file" in said


def test_names_that_are_not_utf8_are_escaped(folder, tmp_path):
    """Copies from old disks have names in Latin-1, which neither a terminal nor JSON can write."""
    name = os.fsdecode(b"caf\xe9")
    put(tmp_path, {f"in/{name}.txt": "from an old disk", f"in/{name}.jsonl": as_rows(["x"]) + b"{"})
    put(tmp_path, {f"{name}.model": (folder / "tokenizer.model").read_bytes()})
    run = subprocess.run(
        [sys.executable, HERE / "prepare.py", "tokenize", "in", f"--tokenizer={name}.model",
         f"--out={name}", "--workers=1", "--val_fraction=0"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert run.returncode == 3 and "in/caf\\xe9.jsonl:2 is not JSON" in run.stderr
    assert "caf\\udce9:" in run.stdout
    assert read_source(tmp_path / name)["train"] == ["x", "from an old disk"]


def test_files_that_are_not_there_are_named(folder, tmp_path, monkeypatch):
    """Part of a corpus would vanish in silence: a link to a blob that was cleaned away, a folder
    that only its owner may read, files that git lfs did not fetch."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"a/x.jsonl": as_rows(["here"]), "b/secret/y.jsonl": b"", "b/.git/z.jsonl": b""})
    Path("a/y.jsonl").symlink_to("../blobs/9f86d081884c7d65")
    Path("a/notes.md").symlink_to("../blobs/2c26b46b68ffc68f")                  # no text anyway
    assert "a/y.jsonl is a link to a file that is not there" in tokenize(folder, "a", "--out=o")
    Path("a/y.jsonl").unlink()
    assert tokenize(folder, "a", "--out=o", "--val_fraction=0") == 0
    real = os.scandir

    def scandir(path):                  # root may read everything, so chmod proves nothing
        if str(path).endswith(("secret", ".git")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        said = tokenize(folder, "b", "--out=p")
    assert said.startswith("b cannot be opened") and said.endswith("Permission denied: "
                                                                   f"'{tmp_path}/b/secret'")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 73492013\n"
    put(tmp_path, {f"{k}/{name}": pointer for k, name in enumerate(
        ["x.txt", "x.jsonl", "x.jsonl.zst", "x.parquet"])})
    for k in range(4):
        said = tokenize(folder, str(k), "--out=q")
        assert "is a Git LFS pointer, not the file: git lfs pull" in said
    assert not Path("p").exists() and not Path("q").exists()


def test_what_is_passed_over_in_a_folder_is_said(folder, tmp_path, monkeypatch, capsys):
    """Hubs put a dataset_infos.json beside the text: its one line gave exit status 3. Files of
    other kinds were passed over without a word."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {f"in/{name}.json": '{"default": {}}' for name in (
        "dataset_infos", "dataset_dict", "source", "config", "tokenizer_config", "tokenizer",
        "generation_config", "special_tokens_map", "state", "model.safetensors.index")})
    put(tmp_path, {"in/a.jsonl": as_rows(["fine"]), "in/LICENSE.txt": "fine", "in/b.csv": "x"})
    assert tokenize(folder, "in", "--out=out", "--val_fraction=0") == 0
    assert read_source(tmp_path / "out")["train"] == ["fine", "fine"]
    assert capsys.readouterr().err == (f"{tmp_path}/in: files that are not read, going by their "
                                       f"names: 11 ({tmp_path}/in/b.csv, ...)\n")
    put(tmp_path, {"source.json": as_rows(["a file by that name"])})
    assert tokenize(folder, "source.json", "--out=named", "--val_fraction=0") == 0
    assert capsys.readouterr().err == ""


def test_what_exists_is_no_pattern(folder, tmp_path, monkeypatch):
    """Of a folder "[old]" the files of folders "o", "l" and "d" were read instead."""
    monkeypatch.chdir(tmp_path)
    names = ["[old]/x1", "o/x1", "run[1]/x1", "run1/x1", "a*/[b]/x[1]", "ab/[b]/x1", "ab/b/x1"]
    put(tmp_path, {f"{name}.txt": name for name in names})
    with zipfile.ZipFile("far.zip", "w") as archive:
        for name in names:
            archive.writestr(f"{name}.txt", name)
    for given, found in [("[old]/x*.txt", ["[old]/x1"]), ("run[1]/*", ["run[1]/x1"]),
                         ("a*/*/x[1].txt", ["a*/[b]/x[1]"]), ("run[12]", ["run1/x1"]),
                         ("[ao]b/[b]/*", ["ab/[b]/x1"]), ("run?", ["run1/x1"])]:
        for path in given, f"zip://{given}::far.zip":
            assert [file.path.removeprefix(f"{tmp_path}/").removesuffix(".txt")
                    for file in documents.list_files([path])] == found


def test_patterns_find_what_folders_do(tmp_path, monkeypatch):
    """Below a * or **, linked folders were left out, and those that may not be read, too."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {f"{name}/x.txt": "text" for name in ("more/deep", "in/a", "in/.git", "in")})
    Path("in/link").symlink_to("../more")
    for pattern, names in [("in/*/x.txt", ["in/a/x.txt"]), ("in/*/*/*", ["in/link/deep/x.txt"]),
                           ("in/**/x.txt", ["in/a/x.txt", "in/link/deep/x.txt", "in/x.txt"]),
                           ("in/**", ["in/a/x.txt", "in/link/deep/x.txt", "in/x.txt"]),
                           ("in/.git/*", ["in/.git/x.txt"])]:
        assert [file.name for file in documents.list_files([pattern])] == names
    real = os.scandir

    def scandir(path):                  # root may read everything, so chmod proves nothing
        if str(path).endswith("in/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for pattern in "in/*/x.txt", "in/**/*.txt":
        with pytest.raises(SystemExit, match="Permission denied: '.*in/a'"):
            documents.list_files([pattern])


@pytest.mark.parametrize("name, make", [("a.jsonl", as_rows), ("a.parquet", as_parquet)])
def test_rows_are_chosen(name, make, folder, tmp_path, capsys):
    """SlimPajama without its GitHub part: a rule that silently matches nothing trains on it."""
    put(tmp_path, {name: make(DOCUMENTS, key="content")})
    common = [tmp_path / name, "--text_key=content", "--val_fraction=0"]
    assert tokenize(folder, *common, f"--out={tmp_path / 'out'}", "--exclude=meta.set=S1",
                    "--exclude=meta.n=3", "--exclude=meta.n=4", "--exclude=meta.nothing=1") == 0
    assert read_source(tmp_path / "out")["train"] == [
        text for k, text in enumerate(DOCUMENTS) if k % 3 != 1 and k != 3]
    printed = capsys.readouterr().out
    assert "rows skipped: 12, meta.set=S1\n" in printed
    assert "rows skipped: 1, meta.set=S1 and meta.n=4" in printed
    assert "no row was excluded by meta.nothing" in printed and "by meta.n=" not in printed
    # where nothing is left, it is said what became of it
    message = tokenize(folder, *common, f"--out={tmp_path / 'none'}",
                       *(f"--exclude=meta.set=S{k}" for k in range(3)))
    assert message.startswith("there is no text in these files; rows skipped: 14, meta.set=S0")
    # a fraction is chosen by hash: the smaller lies in the larger, and in no run of the file
    taken = []
    for fraction in 0.2, 0.6:
        out = tmp_path / str(fraction)
        assert tokenize(folder, *common, f"--fraction={fraction}", f"--out={out}") == 0
        taken.append([DOCUMENTS.index(text) for text in read_source(out)["train"]])
    assert set(taken[0]) < set(taken[1]) and 2 < len(taken[0]) < 14 and 15 < len(taken[1]) < 33
    assert max(np.diff(taken[1])) > 1 and max(taken[0]) > 20


def test_a_key_may_lie_deeper(folder, tmp_path):
    """Real corpora keep their text anywhere."""
    rows = [{"a": {"b": "deep"}}, {"a.b": "flat"}, {"a": 1}]
    put(tmp_path, {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    assert tokenize(folder, tmp_path / "a.jsonl", "--text_key=a.b", "--val_fraction=0",
                    f"--out={tmp_path / 'out'}") == 3
    assert read_source(tmp_path / "out")["train"] == ["deep", "flat"]


# --------------------------------------------------------------------------------------------------
# What is wrong with a corpus

GOOD = as_rows(["fine", "fine, too"])
BAD = {      # name, content, what is said of it, documents kept, rows lost
    "line": ("a.jsonl", GOOD + b'{"te\n' + GOOD, "a.jsonl:3 is not JSON", 4, 1),
    "utf-8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl:3 is not UTF-8: byte 10", 2, 1),
    "txt": ("a.txt", b"good \xff bad", "not UTF-8: byte 5 is 0xff", 0, 1),
    "key": ("a.jsonl", GOOD + b'{"content": "x"}\n', "['content']: name the key with --text_key",
            2, 1),
    "list": ("a.jsonl", GOOD + b"[1]\n", "a.jsonl:3 is a list, and a row with keys is wanted", 2,
             1),
    "number": ("a.jsonl", GOOD + b'{"text": 7}\n', "a.jsonl:3 is no text but 7", 2, 1),
    "null": ("a.jsonl", GOOD + b'{"text": null}\n', "a.jsonl:3 is no text but None", 2, 1),
    "surrogate": ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', "no text that UTF-8 can write", 2, 1),
    "depth": ("a.jsonl", GOOD + b"[" * 10 ** 5 + b"\n", "a.jsonl:3 is not JSON", 2, 1),
    "utf-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "convert UTF-16", 0, 3),
    "utf-16 txt": ("a.txt", "ASCII alone".encode("utf-16-le"), "11 of 22 bytes are 0", 0, 1),
    "utf-16 thai": ("a.txt", ("ภาษาไทย" * 5 + " ").encode("utf-16-le") * 9, "9 of 648", 0, 1),
    "utf-32 txt": ("a.txt", "ASCII alone".encode("utf-32-be"), "33 of 44 bytes are 0", 0, 1),
    "end lost": ("a.txt", b"text " * 999 + bytes(99), "99 of 5,094 bytes are 0", 0, 1),
    "one NUL": ("a.txt", b"x = '\0'\n", "", 1, 0),
    "pointer": ("a.txt.gz", gzip.compress(documents.LFS_POINTER + b"v1"), "git lfs pull", 0, 1),
    "array": ("a.json", json.dumps([{"text": "x"}] * 9, indent=1), "jq -c '.[]'", 0, 1),
    "array in rows": ("a.json", "\n[" + '{"text": "x"},\n' * 9 + "{}]", "jq -c '.[]'", 0, 1),
    "objects": ("a.json.gz", gzip.compress(b'{\n"text": "x"\n}\n' * 9), "jq -c .", 0, 1),
    "one array": ("a.json", '[{"text": "x"}]', "a.json:1 is a list, and a row", 0, 1),
    "empty": ("a.jsonl", GOOD + b'{"text": ""}\n\n', "rows skipped: 1, empty", 2, 0),
    "empty txt": ("a.txt", b"", "rows skipped: 1, empty", 0, 0),
    "empty jsonl": ("a.jsonl", b"", "", 0, 0),
    "empty gz": ("a.jsonl.gz", b"", "a.jsonl.gz breaks off", 0, 1),
    "empty zst": ("a.jsonl.zst", b"", "a.jsonl.zst breaks off", 0, 1),
    "gz": ("a.jsonl.gz", gzip.compress(GOOD + os.urandom(9999))[:-3000], "a.jsonl.gz breaks off",
           2, 1),
    "no gz": ("a.jsonl.gz", GOOD, "a.jsonl.gz breaks off", 0, 1),
    "zst": ("a.jsonl.zst", in_frames(GOOD * 50)[:-9], "file ended before the end-of-stream", 66, 1),
    "no zst": ("a.jsonl.zst", GOOD, "a.jsonl.zst breaks off", 0, 1),
    "parquet": ("a.parquet", as_parquet(["fine"])[:-20], "a.parquet breaks off", 0, 1),
    "column": ("a.parquet", as_parquet(["fine"], key="b"),
               "a.parquet: row 1 has no 'text', but the keys ['b', 'meta']", 0, 1),
    "page": ("a.parquet", b"PAR1" + bytes(600) + as_parquet(DOCUMENTS)[604:],
             "a.parquet breaks off", 0, 1)}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_skipped_counted_and_named(case, folder, tmp_path, capsys):
    """One bad line in a terabyte must neither stop the work nor pass unnoticed."""
    name, content, words, kept, lost = BAD[case]
    put(tmp_path, {"a": b"", "b.txt": "another file", name: content})
    status = tokenize(folder, tmp_path / name, tmp_path / "b.txt", f"--out={tmp_path / 'out'}",
                      "--val_fraction=0")
    printed = "".join(capsys.readouterr())
    assert words in printed and status == (3 if lost else 0)
    assert len(read_source(tmp_path / "out")["train"]) == kept + 1
    about = json.loads((tmp_path / "out/source.json").read_text())
    assert about["lost"] >= lost and (about["lost"] == 0) == (lost == 0)
    assert len(about["broken"]) == ("breaks off" in printed)
    if lost:
        stopped = tokenize(folder, tmp_path / name, tmp_path / "b.txt", "--strict",
                           f"--out={tmp_path / 'strict'}", "--val_fraction=0")
        assert "(--strict); 0 of 1 shards are done" in stopped and name in stopped
        with pytest.raises(InputError, match=r"\(--strict\)"):
            prepare.main(["tokenizer", str(tmp_path / name), f"--out={tmp_path / 'my.model'}",
                          "--strict"])
        assert not (tmp_path / "my.model").exists()


@pytest.mark.parametrize("bad", ["text", "url"])
def test_a_value_that_is_not_utf8_costs_one_row_of_parquet(bad, folder, tmp_path, capsys):
    """One Latin-1 byte lost the rest of the file, even in a column that only --exclude asks for."""
    columns = {"text": [b"row %d" % i for i in range(100)], "url": [b"http://x"] * 100}
    columns[bad][20] = b"caf\xe9"
    arrays = {name: pyarrow.array(values, pyarrow.binary()) for name, values in columns.items()}
    table = pyarrow.table({name: pyarrow.Array.from_buffers(pyarrow.string(), 100, array.buffers())
                           for name, array in arrays.items()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert tokenize(folder, tmp_path / "a.parquet", f"--out={tmp_path / 'out'}",
                    "--val_fraction=0", "--exclude=url=http://y") == 3
    assert read_source(tmp_path / "out")["train"] == [f"row {i}" for i in range(100) if i != 20]
    assert "a.parquet: row 21 is not UTF-8" in capsys.readouterr().err


def test_values_of_parquet_are_compared_as_text(folder, tmp_path):
    """--exclude=date=2024-01-01 excluded nothing: the value was '"2024-01-01"'."""
    day = datetime.datetime(2024, 1, 1, 3)
    values = {"date": day.date(), "time": day, "decimal": decimal.Decimal("1.50"), "raw": b"abc",
              "yes": True, "number": 3.0, "list": ["é"], "dates": [day.date()], "nothing": None}
    far = pyarrow.array([2 ** 61, 0, 1, 2], pyarrow.timestamp("us"))       # the year 75,000
    types = {"view": pyarrow.string_view(), "large": pyarrow.large_string(),
             "binary": pyarrow.binary(),
             "dictionary": pyarrow.dictionary(pyarrow.int8(), pyarrow.string())}
    pyarrow.parquet.write_table(pyarrow.table(
        {"far": far} | {key: [value, None, value, None] for key, value in values.items()}
        | {key: pyarrow.array(list("abcd")).cast(kind) for key, kind in types.items()}),
        tmp_path / "a.parquet")

    def texts(text_key, *exclude):
        reader = documents.TextReader(documents.list_files([str(tmp_path / "a.parquet")]),
                                      documents.RowFilter(text_key, exclude), False, int)
        return "".join(reader.texts())

    for key in types:
        assert texts(key) == "abcd"
    for key, value in [("date", "2024-01-01"), ("time", "2024-01-01 03:00:00"), ("raw", "abc"),
                       ("decimal", "1.50"), ("yes", "true"), ("number", "3.0"),
                       ("list", '["é"]'), ("dates", '["2024-01-01"]')]:
        assert texts("large", (key, value)) == "bd"
    assert texts("large", ("nothing", "null")) == "" and texts("large", ("raw", "null")) == "ac"
    assert texts("large", ("far", "x")) == "bcd"            # one row, not the rest of the file


def test_large_windows_of_zstandard_are_read(folder, tmp_path):
    """Corpora are packed by `zstd --long=31`, which a reader by default refuses."""
    options = {zstd.CompressionParameter.window_log: 31}
    compressor = zstd.ZstdCompressor(options=options)
    packed = compressor.compress(as_rows(DOCUMENTS)) + compressor.flush()
    assert zstd.get_frame_info(packed).decompressed_size is None        # so the window is needed
    put(tmp_path, {"a.jsonl.zst": packed})
    assert tokenize(folder, tmp_path / "a.jsonl.zst", f"--out={tmp_path / 'out'}",
                    "--val_fraction=0") == 0
    assert read_source(tmp_path / "out")["train"] == DOCUMENTS


def test_many_bad_rows_are_counted_not_named(folder, tmp_path, capsys):
    """A wrong key in a corpus of a billion rows would fill the disk with complaints."""
    put(tmp_path, {"a.jsonl": as_rows(["x"] * 500, key="content") + GOOD})
    assert tokenize(folder, tmp_path / "a.jsonl", f"--out={tmp_path / 'out'}",
                    "--val_fraction=0") == 3
    printed = capsys.readouterr()
    assert "rows skipped: 500, no 'text'" in printed.out and printed.err.count("a.jsonl:") == 20
    assert "counted, and not named" in printed.err


def test_nothing_to_train_on_is_refused_whole(folder, tmp_path):
    """No folder that looks like a source, or like the beginning of one."""
    put(tmp_path, {"a.jsonl": b'{"text": ""}\n\n', "b.txt": "one document"})
    for name, fraction, words in [("a.jsonl", 0.5, "there is no text"),
                                  ("b.txt", 0.9999999999, "all 1 documents fell to validation")]:
        assert words in tokenize(folder, tmp_path / name, f"--out={tmp_path / 'out'}",
                                 f"--val_fraction={fraction}")
        assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="there is no text"):
        prepare.main(["tokenizer", str(tmp_path / "a.jsonl"), f"--out={tmp_path / 'x'}"])


def test_files_that_cannot_be_read_are_left_for_later(folder, tmp_path, monkeypatch):
    """A file that vanished, or a connection that broke, is no end of a file: what was read of it
    must not count."""
    monkeypatch.setattr(prepare, "SHARD_BYTES", 1)
    put(tmp_path, {f"{k}.txt": f"text {k} " * 50 for k in range(4)})
    arguments = [tmp_path, f"--out={tmp_path / 'out'}", "--val_fraction=0"]
    real = documents.Input.readinto

    def dead_line():
        raise ConnectionError("the line is dead")

    def readinto(self, buffer):
        if self.file.name.endswith("1.txt"):
            self.wrap_read_errors(dead_line)
        if self.file.name.endswith("2.txt"):
            os.truncate(self.file.path, 3)
        return real(self, buffer)

    monkeypatch.setattr(documents.Input, "readinto", readinto)
    (tmp_path / "3.txt").rename(tmp_path / "3.old")
    listed = prepare.list_files
    (tmp_path / "3.old").rename(tmp_path / "3.txt")
    files = listed([str(tmp_path)], tmp_path / "out")
    (tmp_path / "3.txt").rename(tmp_path / "3.old")
    monkeypatch.setattr(prepare, "list_files", lambda given, out: files)
    said = tokenize(folder, *arguments)
    assert "1.txt cannot be read: the line is dead" in said and "3.txt cannot be read" in said
    assert "2.txt ends after 3 bytes, and it had 350" in said and "tries them again" in said
    assert not (tmp_path / "out/source.json").exists()
    assert len(list((tmp_path / "out").glob("*.bin"))) == 2           # train and val of 0.txt
    (tmp_path / "3.old").rename(tmp_path / "3.txt")
    put(tmp_path, {"2.txt": "text 2 " * 50})
    monkeypatch.setattr(documents.Input, "readinto", real)
    assert tokenize(folder, *arguments) == 0
    assert read_source(tmp_path / "out")["train"] == [f"text {k} " * 50 for k in range(4)]


def test_a_full_disk_ends_with_a_sentence_and_can_be_continued(folder, tmp_path):
    """A disk fills after days: a trace of calls, or half a file taken for a whole one, cost
    them."""
    put(tmp_path, {f"{k}.jsonl": as_rows(DOCUMENTS * k) for k in (1, 30, 20)})
    code = f"""if True:
        import prepare, resource, sys
        prepare.SHARD_BYTES = 1
        if sys.argv[1] != "0":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
        prepare.main(["tokenize", ".", "--tokenizer={folder / 'tokenizer.model'}", "--out=out",
                      "--workers=" + sys.argv[2], "--val_fraction=0"])"""

    def run(limit, workers):
        return subprocess.run([sys.executable, "-c", code, str(limit), str(workers)], cwd=tmp_path,
                              text=True, capture_output=True,
                              env=os.environ | {"PYTHONPATH": str(HERE)})

    for workers in 1, 2:
        full = run(12_000, workers)
        assert full.returncode == 1 and "Traceback" not in full.stderr
        assert "out: File too large; " in full.stderr and "the same command" in full.stderr
        assert not list((tmp_path / "out").rglob("*.tmp"))
    assert run(0, 1).returncode == 0
    assert len(read_source(tmp_path / "out")["train"]) == len(DOCUMENTS) * 51


# --------------------------------------------------------------------------------------------------
# Units, workers, parts

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A corpus of some files of several kinds, and of several units."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "SHARD_BYTES", 3000)
    rng = random.Random(0)
    for k in range(12):
        texts = ["".join(rng.choices(TEXT, k=rng.randint(1, 400)))
                 for _ in range(rng.randint(1, 12))]
        put(tmp_path / "in", {f"{k:02}.jsonl": as_rows(texts)} if k % 3 else
            {f"{k:02}.jsonl.gz": gzip.compress(as_rows(texts))})
    put(tmp_path / "in", {"05.jsonl": as_rows(["x"]) + b"not JSON\n"})
    return tmp_path


def test_any_number_of_workers_and_parts_writes_the_same(corpus, folder):
    """Who prepares on another machine trains on other data, if the order depends on who was
    faster."""
    common = ["in", "--val_fraction=0.2", "--exclude=meta.n=7"]
    assert tokenize(folder, *common, "--out=one") == 3
    assert len(list(Path("one").glob("train_*.bin"))) > 4
    assert tokenize(folder, *common, "--out=two/one", workers=2) == 3
    statuses = []
    for part in "3/3", "1/3", "2/3":
        assert not Path("parts/one/source.json").exists()
        statuses.append(tokenize(folder, *common, "--out=parts/one", f"--part={part}"))
        refused = pytest.raises(InputError, match="not complete")
        with refused if len(statuses) < 3 else nullcontext():
            Source("parts/one", "train", 16)
    assert statuses[-1] == 3 and statuses[0] == 0
    one = contents(Path("one"))
    for other in Path("two/one"), Path("parts/one"):
        found = contents(other)
        found["source.json"] = found["source.json"].replace(str(other).encode(), b"one")
        assert found == one
    documents = read_source(Path("one"))
    assert not set(documents["train"]) & set(documents["val"]) and len(documents["val"]) > 5


def test_a_finished_source_is_left_alone_and_other_input_refused(corpus, folder):
    """Done twice, days are lost; half of one corpus and half of another is nothing."""
    assert tokenize(folder, "in", "--out=out") == 3
    before = contents(Path("out"))
    times = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert tokenize(folder, "in", "--out=out", workers=2) == 3
    assert contents(Path("out")) == before
    assert {path: path.stat().st_mtime_ns for path in Path("out").iterdir()} == times
    put(corpus, {"more.txt": "more"})
    for change, words in [("--text_key=content", "text_key was text and is content"),
                          ("--val_fraction=0.1", "val_fraction was 0.001 and is 0.1"),
                          ("--fraction=0.5", "fraction was"), ("--exclude=a=b", "exclude was"),
                          ("more.txt", "files was 12 and is 13")]:
        assert words in tokenize(folder, "in", change, "--out=out")
    assert contents(Path("out")) == before
    # the same of one that was begun
    assert tokenize(folder, "in", "--out=begun", "--part=1/2") in (0, 3)
    assert "begun, from other input: val_fraction was" in tokenize(
        folder, "in", "--out=begun", "--val_fraction=0.1")
    for name in "thing", "units/thing":
        put(Path("some"), {name: b"else"})
        assert "is no source that was begun" in tokenize(folder, "in", "--out=some")
    assert len(list(Path("some").rglob("thing"))) == 2
    assert "is a file" in tokenize(folder, "in", "--out=more.txt")
    # a file that changed is named as such, and what somebody put there stays
    put(Path("begun"), {"keep.bin": b"mine"})
    put(corpus / "in", {"04.jsonl": as_rows(["changed"])})
    assert "the files have other names or sizes" in tokenize(folder, "in", "--out=begun")
    assert Path("begun/keep.bin").read_bytes() == b"mine"
    # with nothing done yet another try is free
    assert "(--strict)" in tokenize(folder, "in/05.jsonl", "--out=free", "--strict")
    assert tokenize(folder, "in/04.jsonl", "--out=free") == 0


def test_the_same_work_done_twice_at_the_same_time_does_no_harm(corpus, folder):
    """A scheduler starts a job again, while the first one is still at it."""
    put(corpus, {"out/units/plan.json": b""})                    # begun, and torn
    twice = [start(folder, "in", "--workers=2", "--out=out") for _ in range(3)]
    said = [process.communicate()[1] for process in twice]
    assert {process.returncode for process in twice} == {3}, said
    assert tokenize(folder, "in", "--out=whole") == 3
    found, whole = contents(Path("out")), contents(Path("whole"))
    found["source.json"] = found["source.json"].replace(b"--out=out", b"--out=whole")
    assert found == whole


def test_parts_may_begin_at_the_same_time(corpus, folder):
    """A job array starts all its parts at once, on a folder that is not there yet."""
    Path("early/units").mkdir(parents=True)                      # another is just about to begin
    assert tokenize(folder, "in/01.jsonl", "--out=early") == 0
    parts = [start(folder, "in", "--out=out", "--workers=1", f"--part={k}/4") for k in range(1, 5)]
    assert {part.wait() for part in parts} <= {0, 3}, [part.stderr.read() for part in parts]
    assert tokenize(folder, "in", "--out=whole") == 3
    found, whole = contents(Path("out")), contents(Path("whole"))
    found["source.json"] = found["source.json"].replace(b"--out=out", b"--out=whole")
    assert found == whole


COMMAND = """if True:
    import prepare, sys
    prepare.SHARD_BYTES = 3000
    if __name__ == "__main__":
        prepare.main(sys.argv[1:])"""


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "tokenize", *arguments,
         f"--tokenizer={folder / 'tokenizer.model'}"], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(HERE)},
        start_new_session=True)


@pytest.mark.slow
def test_killed_twenty_times_the_source_is_the_same(corpus, folder):
    """Days of work end by a power cut, an administrator, a full memory, at any moment."""
    put(corpus / "in", {f"{k}.jsonl": as_rows(DOCUMENTS * 400) for k in range(20, 60)})
    arguments = ["in", "--val_fraction=0.2", "--workers=2"]
    assert start(folder, *arguments, "--out=whole").wait() == 3
    rng, killed = random.Random(0), 0
    for attempt in itertools.count():
        process = start(folder, *arguments, "--out=out")
        try:
            status = process.wait(rng.uniform(0.6, 2.2) if killed < 20 else None)
        except subprocess.TimeoutExpired:
            # the first process alone, or it and its workers
            (os.kill if killed % 2 else os.killpg)(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            continue
        assert status == 3, process.stderr.read()
        if killed == 20:
            break
        os.rename("out", f"done{attempt}")
    for out in Path().glob("done*"):
        assert contents(out).keys() == contents(Path("whole")).keys()
    found, whole = contents(Path("out")), contents(Path("whole"))
    found["source.json"] = found["source.json"].replace(b"--out=out", b"--out=whole")
    assert found == whole


def test_a_killed_worker_ends_the_run_and_it_goes_on(corpus, folder):
    """A worker that dies for its memory must not leave the others waiting for ever."""
    put(corpus / "in", {f"{k}.jsonl": as_rows(DOCUMENTS * 300) for k in range(20, 60)})
    process = start(folder, "in", "--val_fraction=0.2", "--workers=2", "--out=out")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs Linux's /proc")
    while len(found := [pid for pid in map(int, children.read_text().split())
                        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]) < 2:
        time.sleep(0.01)
    os.kill(found[-1], signal.SIGKILL)
    assert process.wait() == 1 and "a worker was killed" in process.stderr.read()
    assert not Path("out/source.json").exists() and not list(Path("out").rglob("*.tmp"))


# --------------------------------------------------------------------------------------------------
# Looking at it

def test_inspect_prints_what_is_there(folder, tmp_path, capsys):
    """Who cannot look at the tokens finds out after training what they were."""
    files = write_files(tmp_path, a_txt="Hello there. General greeting.", b_txt="The last words")
    prepare.main(["tokenize", *files, f"--tokenizer={folder / 'tokenizer.model'}",
                  f"--out={tmp_path / 'my'}", "--val_fraction=0"])
    capsys.readouterr()
    prepare.main(["inspect", str(tmp_path / "my")])
    printed = capsys.readouterr().out
    assert "2 documents" in printed and "bytes per token" in printed
    assert "train begins '<s>Hello there. General" in printed and "The last words</s>'" in printed
    assert "vocabulary of 320" in printed and "val begins" not in printed


def test_bad_arguments_are_refused(folder, tmp_path):
    """A refusal after the work, or with half of it left behind, is worse than none."""
    files = write_files(tmp_path, a_txt="some text", bad_model=b"not a model")
    good = f"--tokenizer={folder / 'tokenizer.model'}"
    for arguments, words in [(["--tokenizer=nowhere.model"], "no tokenizer nowhere.model"),
                             ([f"--tokenizer={files[1]}"], "no SentencePiece model"),
                             ([good, "--val_fraction=1.5"], "val_fraction"),
                             ([good, "--fraction=0"], "above 0"),
                             ([good, "--workers=0"], "workers"),
                             ([good, "--part=3/2"], "I/N"), ([good, "--part=1"], "I/N"),
                             ([good, "--exclude=x"], "KEY=VALUE"),
                             ([good, "--val_fraction=0.9999999999"], "fell to validation")]:
        with pytest.raises(SystemExit, match=words):
            prepare.main(["tokenize", files[0], *arguments, f"--out={tmp_path / 'out'}"])
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.*tmp"))


# --------------------------------------------------------------------------------------------------
# The embedded corpus

def test_files_of_the_folder_one_is_in(tmp_path, monkeypatch):
    """Without an --out to leave out, those of the working directory itself were left out."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, a_txt="text")
    assert [file.name for file in prepare.list_files(["a.txt"])] == ["a.txt"]


def test_docstrings_are_cut_out():
    """A docstring left in the code would be in both sources, and what is learned from one would
    show in the other."""
    source = '''"""Module."""\nimport os\nclass A:\n    """A\n    doc."""\n    x = "kept"\n\
    def only(self):\n        """Only é."""\n
def one(): "on the line"\nasync def two():\n    "first"; y = 1\n    return """kept too"""\n'''
    docs, code = prepare.split_docstrings(source)
    assert docs == ["Module.", "A\ndoc.", "Only é.", "on the line", "first"]
    assert not any(doc in code for doc in docs) and code.count("kept") == 2
    tree = ast.parse(code)
    assert not [n for n in ast.walk(tree)
                if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(n)]
    compile(code, "x", "exec")


MODULE = "\n\n\n".join(
    f"def f{k}(x):\n" f'    """Return the thing that has number {k}.\n\n    Or not."""\n'
    f"    return x + {k}  # that number\n" for k in range(600))


def test_the_demo_builds_three_sources(tmp_path, monkeypatch):
    """The demo is what newcomers meet first: it must build from whatever this Python brings, with
    one tokenizer for all, and its questions must be held out."""
    monkeypatch.setattr(prepare, "stdlib_corpus", lambda: (
        [f"Prose number {k}. " * 9 for k in range(60)],
        [f"x{k} = {k} + 1\n" * 9 for k in range(60)]))
    monkeypatch.setattr(prepare, "library_modules", lambda: {"pack/mod.py": MODULE})
    prepare.main(["demo", f"--data_dir={tmp_path}", "--vocab_size=300"])
    names = "demo-prose", "demo-code", "demo-chat"
    prose, code, chat = (Source(tmp_path / name, "train", 32) for name in names)
    assert len({source.header.tokenizer_sha256 for source in (prose, code, chat)}) == 1
    assert prose.windows > 10 < code.windows and chat.masks and not prose.masks
    assert Source(tmp_path / "demo-prose", "val", 32).windows > 0
    sp = load_tokenizer(tmp_path / "demo-chat/tokenizer.model")
    train, val = (sp.decode(source.read(0, source.header.tokens).tolist()) for source in (
        chat, Source(tmp_path / "demo-chat", "val", 32)))
    lines = (tmp_path / "demo-chat/questions.txt").read_text().splitlines()
    assert len(lines) == 39 and set(lines[1::2]) == {"/new"}
    assert all(question in val and question not in train for question in lines[::2])
    assert "Write a function that returns the thing" in train and "return x + " in train
    prepare.main(["demo", f"--data_dir={tmp_path}", "--vocab_size=300"])  # again: in the same place
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_no_text_is_in_both_demo_sources(monkeypatch):
    """Learning of prose would otherwise be measured as learning of code."""
    modules = prepare.library_modules()
    assert sum(map(len, modules.values())) > 4 * 10 ** 6
    some = {name: modules[name] for name in sorted(modules)[::8]}
    monkeypatch.setattr(prepare, "library_modules", lambda: some)
    prose, code = prepare.stdlib_corpus()
    whole, long = "\n".join(code), [text.strip() for text in prose if len(text) > 200]
    assert len(long) > 200 and len(whole) > 10 ** 5
    assert sum(text in whole for text in long) == 0


def test_no_text_of_the_demos_conversations_is_in_both_splits(monkeypatch):
    """Answers that were read before are recited, and look like learning: a text for validation is
    not for training, as question, as answer, or in the prose and code of pretraining."""
    modules = prepare.library_modules()
    some = {name: modules[name] for name in sorted(modules)[::48]} | {
        "a.py": MODULE, "b.py": MODULE.replace("Return the", "Another. Return the")}
    monkeypatch.setattr(prepare, "library_modules", lambda: some)
    prose, code = prepare.stdlib_corpus()
    conversations, questions = prepare.stdlib_conversations(prose, 0.3)
    texts = {True: set(), False: set()}
    for messages, key in conversations:
        texts[hash_to_unit(key.encode()) < 0.3] |= {text for _, text in messages}
    assert len(texts[True]) > 50 < len(texts[False]) and not texts[True] & texts[False]
    assert set(questions) <= texts[True] and len(questions) == 20
    answers = [text for messages, key in conversations
               if hash_to_unit(key.encode()) < 0.3 for _, text in messages[1::2]]
    assert any(answer.startswith("def ") for answer in answers)
    assert not [answer for answer in answers for text in prose + code
                if answer in text and hash_to_unit(text.encode()) >= 0.3]
