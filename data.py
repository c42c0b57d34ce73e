"""Tokens on disk, and the order in which training reads them.

A source is a folder, data/NAME, with token files train_00000.bin, train_00001.bin, ... and
val_00000.bin, ..., the tokenizer they were written with and source.json, which counts what is in
them. Its tokens are those of its files one after the other. With a context of T they are cut into
windows of T + 1 tokens, of which the last is the first of the next window (T = 4 here), so that
each token but the first is a target exactly once:

    tokens      a b c d e f g h i j k       x = a b c d    y = b c d e
    window 0    a b c d e                   x = e f g h    y = f g h i
    window 1            e f g h i           and j, k, fewer than T, are left over

Which windows make up optimizer step k follows from (seed, stages, k) alone: from nothing read
before, no state of a loader, no number of GPUs. So a run continues anywhere, at once and exactly,
and knowing a step is knowing its data. Two ideas do it.

1. Mixing: in what order the sources take turns. After x sequences of a stage a source should have
   given its share, integrated from the stage's start, a real number; it falls due for its j-th
   sequence when that number passes j - 1/2. Serving the sources as they fall due keeps each within
   (K - 1)/2 sequences of its share, for K sources, and no count ever goes back. Shares are
   fractions, never floats: rounding would let a count go back by one now and then.
2. Shuffling: a permutation of a source's windows for each epoch that is computed at one index and
   never stored, a Feistel network (Luby and Rackoff 1988). Each round is invertible, whatever its
   keys, so the whole is.
"""
import json
import os
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b, sha256
from math import floor, isqrt, log
from pathlib import Path

import numpy as np

from files import InputError

MAGIC, VERSION, HEADER_BYTES = 20240104, 1, 1024


class DataError(InputError):
    """Data or a mixture that cannot be trained on; the message says which, and what to do."""


# --------------------------------------------------------------------------------------------------
# Token files: 256 little-endian int32, then the tokens as uint16, or uint32 where the vocabulary
# needs it

@dataclass(frozen=True)
class Header:
    vocab_size: int
    bos_id: int
    eos_id: int
    tokenizer: str                 # sha256 of tokenizer.model, in hex
    tokens: int = 0

    @property
    def dtype(self):
        return np.dtype("<u2" if self.vocab_size <= 65_536 else "<u4")

    def pack(self):
        words = np.zeros(256, "<u4")
        words[:8] = (MAGIC, VERSION, self.dtype.itemsize, self.vocab_size,
                     self.tokens & 0xFFFFFFFF, self.tokens >> 32, self.bos_id, self.eos_id)
        words[8:16] = np.frombuffer(bytes.fromhex(self.tokenizer), "<u4")
        return words.tobytes()


def read_header(path):
    """The Header of a token file, after every check that needs no token. Raises DataError."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path} is truncated: {len(raw)} bytes, "
                        f"and the header alone has {HEADER_BYTES}; prepare it again")
    words = np.frombuffer(raw, "<u4")
    magic, version, itemsize, vocab_size, low, high, bos_id, eos_id = map(int, words[:8])
    if (magic, version) != (MAGIC, VERSION):
        raise DataError(f"{path} is no token file of ours: magic {magic} and version {version} "
                        f"where {MAGIC} and {VERSION} should be; make it with prepare.py tokenize")
    header = Header(vocab_size, bos_id, eos_id, words[8:16].tobytes().hex(), low | high << 32)
    if itemsize != header.dtype.itemsize or max(bos_id, eos_id) >= vocab_size:
        raise DataError(f"{path}: {itemsize} bytes a token, BOS {bos_id} and EOS {eos_id} do not "
                        f"go with a vocabulary of {vocab_size}; prepare it again")
    expected, size = HEADER_BYTES + header.tokens * itemsize, os.path.getsize(path)
    if size != expected:
        raise DataError(f"{path} is {'truncated' if size < expected else 'too long'}: "
                        f"{size} bytes, and its header promises {header.tokens} tokens, "
                        f"{expected} bytes; prepare it again")
    return header


class TokenWriter:
    """Writes one token file under a temporary name, and gives it its own when `with` ends without
    an error."""

    def __init__(self, path, header):
        self.path, self.header, self.tokens = Path(path), header, 0
        self.temporary = self.path.with_name(self.path.name + ".tmp")

    def __enter__(self):
        self.file = open(self.temporary, "wb")
        self.file.write(self.header.pack())
        return self

    def write(self, ids):
        """Appends a sequence of ids. Raises DataError for one that is outside the vocabulary."""
        ids = np.asarray(ids, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.header.vocab_size:
            raise DataError(f"ids {ids.min()} to {ids.max()} for {self.path}, "
                            f"whose vocabulary ends at {self.header.vocab_size - 1}")
        self.write_bytes(ids.astype(self.header.dtype).tobytes())

    def write_bytes(self, raw):
        """Appends ids that are in the file's form already."""
        self.file.write(raw)
        self.tokens += len(raw) // self.header.dtype.itemsize

    def __exit__(self, error, *_):
        try:
            if error is None:
                self.file.seek(0)
                self.file.write(Header(**vars(self.header) | {"tokens": self.tokens}).pack())
                self.file.flush()
                os.fsync(self.file.fileno())
                os.replace(self.temporary, self.path)
        finally:
            try:
                self.file.close()                   # writes what is left: the disk may be full
            finally:
                self.temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Sources

class Source:
    """The windows of one split, "train" or "val", of the folder data/NAME.

    Attributes: name, header (its `tokens` those of all files), windows (how many), info
    (source.json's entry of the split).
    """

    def __init__(self, folder, split, context):
        folder = Path(folder)
        self.name, self.context = folder.name, context
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}: make it with\n  python prepare.py "
                            + ("demo" if self.name.startswith("demo-") else
                               f"tokenize FILES... --tokenizer=tokenizer.model --out={folder}"))
        if (folder / "units").is_dir() and not (folder / "source.json").exists():
            raise DataError(f"{folder} is not complete: the command that began it goes on where it "
                            "was")
        self.files = sorted(folder.glob(f"{split}_*.bin"))
        if not self.files and split == "train":
            raise DataError(f"{folder} has no train_*.bin: prepare it again")
        headers = [read_header(path) for path in self.files]
        total = sum(header.tokens for header in headers)
        self.starts = np.cumsum([0] + [header.tokens for header in headers])
        self.windows = max(0, (total - 1) // context)
        self.info = self.read_info(folder, split, total)
        if headers:
            self.header = Header(**vars(headers[0]) | {"tokens": total})
            self.check_tokenizer(folder, headers)

    @staticmethod
    def read_info(folder, split, total):
        try:
            info = json.loads((folder / "source.json").read_text("utf-8"))[split]
            counted, _, _ = info["tokens"], info["documents"], info["bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / 'source.json'} cannot be read ({error!r}): "
                            "prepare the source again") from None
        if counted != total:
            raise DataError(f"{folder}: source.json counts {counted} tokens for {split}, "
                            f"its files hold {total}: prepare the source again")
        return info

    def check_tokenizer(self, folder, headers):
        try:
            beside = sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"{folder / 'tokenizer.model'} cannot be read ({error}): "
                            "prepare the source again") from None
        for path, header in zip(self.files, headers):
            if Header(**vars(header) | {"tokens": self.header.tokens}) != self.header:
                raise DataError(f"{path} and {self.files[0]} differ in vocabulary, BOS, EOS or "
                                "tokenizer: prepare the source again")
            if header.tokenizer != beside:
                raise DataError(f"{path} was written with another tokenizer "
                                f"({header.tokenizer[:12]}) than the one beside it "
                                f"({beside[:12]}): prepare the source again")

    def window(self, i):
        """Window i, T + 1 ids in int64. Raises DataError for an id outside the vocabulary."""
        return self.read(i * self.context, (i + 1) * self.context + 1)

    def read(self, start, stop):
        """Tokens start to stop - 1 of the source, of which there must be one, from as many files as
        they lie in."""
        parts = []
        for f in range(np.searchsorted(self.starts, start, "right") - 1,
                       np.searchsorted(self.starts, stop, "left")):
            first, last = max(start, self.starts[f]), min(stop, self.starts[f + 1])
            parts.append(np.fromfile(
                self.files[f], self.header.dtype, count=last - first,
                offset=HEADER_BYTES + (first - self.starts[f]) * self.header.dtype.itemsize))
        ids = np.concatenate(parts).astype(np.int64)
        if ids.max() >= self.header.vocab_size:
            raise DataError(f"{self.files[f]}: id {ids.max()} between tokens {start} and {stop}, "
                            f"and the vocabulary ends at {self.header.vocab_size - 1}: "
                            "the file is damaged, prepare it again")
        return ids


def bits_per_byte(nats, size):
    """Bits per byte of a text of `size` bytes that cost a model `nats` in all. Nats per token depend
    on the tokenizer, bits per byte do not."""
    return nats / log(2) / size


# --------------------------------------------------------------------------------------------------
# Stages and mixing

@dataclass(frozen=True)
class Stage:
    """`steps` optimizer steps of `batch` sequences. Over the first `ramp` sequences the share of
    each source goes linearly from what it was before to `shares`; the shares of each of the two add
    up to 1."""
    steps: int
    batch: int
    shares: dict
    before: dict
    ramp: Fraction = Fraction(0)

    @property
    def names(self):
        return sorted({**self.before, **self.shares})

    def __str__(self):
        return (f"{self.steps} steps of {self.batch} sequences, "
                + ", ".join(f"{name} {float(share):.6g}" for name, share in self.shares.items())
                + f", by a ramp of {float(self.ramp):.6g} sequences" * bool(self.ramp))


def parse_stages(stages, context):
    """The list of Stages of a recipe's `stages`: dicts of tokens, batch (tokens), mixture and,
    where wanted, ramp (tokens). A stage of N tokens has ceil(N / batch) steps. Raises DataError for
    what is not a recipe, naming stage and numbers."""
    parsed = []
    for k, stage in enumerate(stages, 1):
        keys = (set(stage) if isinstance(stage, dict) and isinstance(stage.get("mixture"), dict)
                else set())
        if not {"tokens", "batch", "mixture"} <= keys <= {"tokens", "batch", "mixture", "ramp"}:
            raise DataError(f"stage {k} is {stage}: it must be a dict of tokens, batch, "
                            "mixture (itself a dict, source: share) and, where wanted, ramp")
        tokens, batch, ramp = (require_int(stage.get(key, 0), f"{key} of stage {k}")
                               for key in ("tokens", "batch", "ramp"))
        if tokens < 1 or batch < 1:
            raise DataError(f"stage {k} has {tokens} tokens in batches of {batch}: "
                            "both must be at least 1")
        if batch % context:
            raise DataError(f"stage {k}: a batch of {batch} tokens is no whole number of sequences "
                            f"of {context}; the next that is: {-(-batch // context) * context}")
        if not 0 <= ramp <= tokens or (ramp and k == 1):
            raise DataError(f"stage {k} has a ramp of {ramp} tokens: it may be as long as the "
                            f"stage, {tokens}, and the first stage has none")
        shares = stage["mixture"].values()
        if (not all(type(s) in (int, float) and 0 <= s < float("inf") for s in shares)
                or not all(type(name) is str for name in stage["mixture"]) or not sum(shares)):
            raise DataError(f"stage {k}: the mixture {stage['mixture']} must give each name of a "
                            "source a number, none negative, not all zero")
        for name in stage["mixture"]:
            if name in ("", "..") or Path(name).name != name:
                raise DataError(f"stage {k}: the source {name!r} is no plain name of a folder")
        exact = {name: Fraction(str(share)) for name, share in stage["mixture"].items()}
        shares = {name: share / sum(exact.values()) for name, share in exact.items()}
        before = parsed[-1].shares if ramp else shares
        parsed.append(Stage(-(-tokens // batch), batch // context, shares, before,
                            Fraction(ramp, context)))
    if not parsed:
        raise DataError("the recipe has no stages: it needs at least one")
    return parsed


def require_int(number, what):
    if type(number) not in (int, float) or number != number // 1:
        raise DataError(f"{what} must be a whole number, got {number!r}")
    return int(number)


def target_count(stage, name, x):
    """How many sequences source `name` should have given after x of the stage: its integrated
    share, rounded. Exact."""
    before, share = stage.before.get(name, 0), stage.shares.get(name, 0)
    r = min(x, stage.ramp)
    integral = before * r + share * (x - r)
    if r:
        integral += (share - before) * r * r / (2 * stage.ramp)
    return floor(integral + Fraction(1, 2))


def sequences_per_source(stage, n):
    """How many of the first n sequences of a stage come from each source, {name: count}.

    The counts due at x add up to within K/2 of x, so what was due K sequences ago has been served
    by now, and from there it takes a few turns, each source in turn by name giving one when it has
    become due for one more.
    """
    names = stage.names
    x = max(0, n - len(names))
    served = {name: target_count(stage, name, x) for name in names}
    left = n - sum(served.values())
    while left:
        x += 1
        for name in names:
            if left and target_count(stage, name, x) > served[name]:
                served[name] += 1
                left -= 1
    return served


# --------------------------------------------------------------------------------------------------
# Shuffling

def splitmix64(x, key):
    """The mixing function of splitmix64 on an array of uint64, which wraps around on purpose."""
    x = x + key
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def permute(indices, n, *key):
    """Elements `indices` (array of ints below n) of the permutation of range(n) that `key` names,
    as int64.

    An index is a place (l, r) in a table of a x b >= n places. A round moves l by a number that
    depends on r alone, the next one r by a number that depends on l alone: both can be undone, so
    places are permuted. A place beyond n is moved on until it falls below n, which keeps it a
    permutation.
    """
    keys = np.frombuffer(blake2b(repr(key).encode()).digest(), "<u8")         # 8 of them
    a = isqrt(n - 1) + 1
    a, b = np.uint64(a), np.uint64(-(-n // a))
    place = np.array(indices, np.uint64)
    moving = np.ones(place.shape, bool)
    while moving.any():
        l, r = place[moving] // b, place[moving] % b
        for k in range(0, 8, 2):
            # % before +: a sum that wraps at 2^64 could not be undone
            l = (l + splitmix64(r, keys[k]) % a) % a
            r = (r + splitmix64(l, keys[k + 1]) % b) % b
        place[moving] = l * b + r
        moving = place >= n
    return place.astype(np.int64)


def sequences(stages, windows, seed, step):
    """The batch of optimizer step `step` (from 0): a list of (source name, window). `windows` is
    {name: how many it has}.

    A source's windows are numbered through the run, across stages; the j-th is element j mod W of
    its epoch j div W.
    """
    given = dict.fromkeys(windows, 0)
    for stage in stages:
        if step < stage.steps:
            break
        step -= stage.steps
        for name, count in sequences_per_source(stage, stage.steps * stage.batch).items():
            given[name] += count
    else:
        raise IndexError("the step lies behind the last stage")
    first, last = sequences_per_source(stage, step * stage.batch), sequences_per_source(stage, (step + 1) * stage.batch)
    batch = []
    for name in first:
        j = np.arange(given[name] + first[name], given[name] + last[name])
        epoch = j // windows[name]
        for e in np.unique(epoch):
            chosen = permute(j[epoch == e] % windows[name], windows[name], seed, name, int(e))
            batch += [(name, int(w)) for w in chosen]
    return batch
