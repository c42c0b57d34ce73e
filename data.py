"""Tokens on disk, and the order in which training reads them.

A source is a folder, data/NAME: token files train_00000.bin, train_00001.bin, ... and
val_00000.bin, ..., the tokenizer that wrote them, and source.json with their counts. Its tokens are
those of its files, one file after the other. They are cut into windows of context + 1 tokens that
overlap by one. A model learns to predict the next token, so a window gives inputs x and targets y,
shifted by one. Thanks to the overlap every token is a target exactly once, except the very first
and the few left over at the end. With a context of 4:

    tokens      a b c d e f g h i j k       x = a b c d    y = b c d e
    window 0    a b c d e                   x = e f g h    y = f g h i
    window 1            e f g h i           j and k are left over

Windows ignore where documents end, so attention sees earlier documents of its window, as it does in
the original.

Which windows make up the batch of step k follows from (seed, stages, k) alone. There is no loader
with a state to save, and it does not matter how many GPUs there are, so a run continues anywhere,
exactly. Two ideas make that possible:

1. Mixing decides whose turn it is. With shares 0.7 and 0.3, source a should give 0.7·n of the first
   n sequences, and b 0.3·n. Rounded to whole sequences, these counts only ever grow, and a source
   has its turn when its count does; where two grow together, a turn each, in the order of names:

       n              1    2    3    4    5    6    7    8    9    10
       0.7·n rounded  1    1    2    3    4    4    5    6    6     7
       0.3·n rounded  0    1    1    1    2    2    2    2    3     3
       turn           a    b    a    a    a    b    a    a    b     a

   Each of M sources stays within (M - 1) / 2 sequences of its exact share. Shares are fractions, as
   with floats a count could go back by one now and then.
2. Shuffling decides which of a source's windows is next. Each epoch has a permutation of its own,
   which is computed for one index at a time and never stored: a Feistel network (Luby and Rackoff
   1988). Each of its rounds can be undone, whatever the key, so all together are a permutation.

A window in a batch is called a sequence, or a row of x. Recipes give batches in tokens, a Stage
counts them in sequences.

Of a conversation only the answers are to be learned, the rest is read. Such a source has a mask
beside each token file, train_00000.mask, with one byte per token: 1 for those that are learned.
"""
import os
from bisect import bisect_right
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate
from math import floor, inf, isqrt, log
from pathlib import Path

import numpy as np

from files import InputError, atomic_write, read_json, sha256_file

MAGIC, VERSION, HEADER_BYTES = 20240104, 1, 1024
IGNORED = -100      # the target where nothing is to be learned, as PyTorch's ignore_index


def require(condition, message):
    if not condition:
        raise InputError(message)


# --------------------------------------------------------------------------------------------------
# Token files: 256 little-endian int32, then the tokens as uint16, or as uint32 where the vocabulary
# needs it

@dataclass(frozen=True)
class Header:
    vocab_size: int
    bos_id: int
    eos_id: int
    tokenizer_sha256: str          # of tokenizer.model, in hex
    tokens: int = 0

    @property
    def dtype(self):
        return np.dtype("<u2" if self.vocab_size <= 65_536 else "<u4")

    def pack(self):
        words = np.zeros(256, "<u4")
        words[:8] = (MAGIC, VERSION, self.dtype.itemsize, self.vocab_size,
                     self.tokens & 0xFFFFFFFF, self.tokens >> 32, self.bos_id, self.eos_id)
        words[8:16] = np.frombuffer(bytes.fromhex(self.tokenizer_sha256), "<u4")
        return words.tobytes()


def read_header(path):
    """The Header of a token file, after every check that needs no token. Raises InputError."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    require(len(raw) == HEADER_BYTES, f"{path} is truncated: {len(raw)} bytes, and the header "
            f"alone has {HEADER_BYTES}; prepare it again")
    words = np.frombuffer(raw, "<u4")
    magic, version, itemsize, vocab_size, low, high, bos_id, eos_id = map(int, words[:8])
    require((magic, version) == (MAGIC, VERSION), f"{path} is not a token file written by "
            f"prepare.py: magic {magic} and version {version} instead of {MAGIC} and {VERSION}")
    header = Header(vocab_size, bos_id, eos_id, words[8:16].tobytes().hex(), low | high << 32)
    require(itemsize == header.dtype.itemsize and max(bos_id, eos_id) < vocab_size,
            f"{path}: {itemsize} bytes per token, BOS {bos_id} and EOS {eos_id} do not go with a "
            f"vocabulary of {vocab_size}; prepare it again")
    expected, size = HEADER_BYTES + header.tokens * itemsize, os.path.getsize(path)
    require(size == expected, f"{path} is {'truncated' if size < expected else 'too long'}: {size} "
            f"bytes, and its header promises {header.tokens} tokens, {expected} bytes; prepare it "
            "again")
    return header


@contextmanager
def token_writer(path, header):
    """Yields the file, for ids in the header's dtype. It gets its name only once it is complete."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(header.pack())
        yield file
        tokens = (file.tell() - HEADER_BYTES) // header.dtype.itemsize
        file.seek(0)
        file.write(replace(header, tokens=tokens).pack())


# --------------------------------------------------------------------------------------------------
# Sources

class Source:
    """The windows of one split, "train" or "val", of the folder data/NAME.

    Attributes: name, header (its `tokens` are those of all files), windows (how many there are),
    info (its counts in source.json), learned_tokens and learned_bytes (without masks, of all).
    """

    def __init__(self, folder, split, context):
        folder = Path(folder)
        self.name, self.context = folder.name, context
        command = ("demo" if self.name.startswith("demo-") else
                   f"tokenize FILES... --tokenizer=tokenizer.model --out={folder}   # or chat")
        require(folder.is_dir(), f"there is no folder {folder}: make it with\n"
                f"  python prepare.py {command}")
        require((folder / "source.json").exists() or not (folder / "units").is_dir(),
                f"{folder} is not complete: the command that began it, given again, continues")
        self.files = sorted(folder.glob(f"{split}_*.bin"))
        require(self.files or split == "val", f"{folder} has no train_*.bin: prepare it again")
        headers = [read_header(path) for path in self.files]
        self.starts = np.cumsum([0] + [header.tokens for header in headers])
        total = int(self.starts[-1])
        self.windows = max(0, (total - 1) // context)
        self.info = read_counts(folder, split, total)
        self.masks = [path.with_suffix(".mask") for path in self.files
                      if "learned_tokens" in self.info]
        for path, header in zip(self.masks, headers):
            require(path.is_file() and os.path.getsize(path) == header.tokens, f"{path} is not "
                    f"there with {header.tokens} bytes, one per token: prepare the source again")
        self.learned_tokens, self.learned_bytes = (
            self.info.get(f"learned_{key}", self.info[key]) for key in ("tokens", "bytes"))
        if headers:
            self.header = replace(headers[0], tokens=total)
            self.check_tokenizer(folder, headers)

    def check_tokenizer(self, folder, headers):
        require((folder / "tokenizer.model").is_file(),
                f"{folder} has no tokenizer.model: prepare the source again")
        expected = replace(self.header, tokenizer_sha256=sha256_file(folder / "tokenizer.model"))
        for path, header in zip(self.files, headers):
            require(replace(header, tokens=expected.tokens) == expected,
                    f"{path} was written with another tokenizer than the one in its folder, or has "
                    f"another BOS or EOS than {self.files[0]}: prepare the source again")

    def window(self, i):
        """Window i: context + 1 ids in int64. Raises InputError for one outside the vocabulary."""
        return self.read(i * self.context, (i + 1) * self.context + 1)

    def example(self, i):
        """Inputs and targets of window i (2, context): the latter IGNORED where none is learned."""
        ids = self.window(i)
        return np.stack((ids[:-1], np.where(self.learned(i), ids[1:], IGNORED)))

    def learned(self, i):
        """Which targets of window i are to be learned, in bool."""
        return self.read_mask(i * self.context + 1, (i + 1) * self.context + 1)

    def read(self, start, stop):
        """Tokens start to stop - 1 of the source (at least one), from as many files as they lie
        in."""
        ids = self.read_parts(self.files, self.header.dtype, HEADER_BYTES, start, stop,
                              self.header.vocab_size - 1)
        return ids.astype(np.int64)

    def read_mask(self, start, stop):
        if not self.masks:
            return np.ones(stop - start, bool)
        return self.read_parts(self.masks, np.dtype("u1"), 0, start, stop, 1).astype(bool)

    def read_parts(self, files, dtype, offset, start, stop, most):
        """Numbers start to stop - 1 of those in `files`, of which each begins at `offset`."""
        parts = []
        for f in range(np.searchsorted(self.starts, start, "right") - 1,
                       np.searchsorted(self.starts, stop, "left")):
            first, last = max(start, self.starts[f]), min(stop, self.starts[f + 1])
            parts.append(np.fromfile(files[f], dtype, count=last - first,
                                     offset=offset + (first - self.starts[f]) * dtype.itemsize))
        numbers = np.concatenate(parts)
        require((largest := numbers.max()) <= most, f"{files[f]}: {largest} between tokens {start} "
                f"and {stop}, and {most} is the largest: the file is damaged, prepare it again")
        return numbers


def read_counts(folder, split, total):
    """source.json's counts of a split, whose files hold `total` tokens."""
    try:
        info = read_json(folder / "source.json")[split]
        tokens, _, _ = info["tokens"], info["documents"], info["bytes"]
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'source.json'} is damaged ({error!r}): "
                         "prepare the source again") from None
    require(tokens == total, f"{folder}: source.json counts {tokens} tokens for {split}, its files "
            f"hold {total}: prepare the source again")
    return info


def bits_per_byte(nats, size):
    """Bits per byte of a text of `size` bytes that cost a model `nats` in all. Unlike nats per
    token, they do not depend on the tokenizer."""
    return nats / log(2) / size


# --------------------------------------------------------------------------------------------------
# Stages

@dataclass(frozen=True)
class Stage:
    """`steps` optimizer steps of `batch` sequences. Over the first `ramp` sequences the share of
    each source goes linearly from `before`, that of the stage before, to `shares`. The shares in
    each of the two add up to 1."""
    steps: int
    batch: int
    shares: dict
    before: dict
    ramp: Fraction = Fraction(0)   # tokens / context, so not always whole

    @property
    def names(self):
        return sorted({**self.before, **self.shares})

    def __str__(self):
        mixture = ", ".join(f"{name} {float(s):.6g}" for name, s in self.shares.items())
        ramp = f", with a ramp over {float(self.ramp):.6g} sequences" if self.ramp else ""
        return f"{self.steps} steps of {self.batch} sequences, {mixture}{ramp}"


def parse_stages(stages, context):
    """The list of Stages of a recipe's `stages`: dicts of tokens, batch (in tokens), mixture and,
    where wanted, ramp (in tokens). A stage of N tokens has ceil(N / batch) steps. Raises InputError
    for what is not a recipe, naming stage and numbers."""
    parsed = []
    for k, stage in enumerate(stages, 1):
        keys = {"tokens", "batch", "mixture"}
        require(isinstance(stage, dict) and keys <= set(stage) <= keys | {"ramp"}
                and isinstance(stage["mixture"], dict),
                f"stage {k} is {stage}: it must be a dict of tokens, batch, mixture (itself a "
                "dict, source: share) and, where wanted, ramp")
        tokens, batch, ramp = (require_int(stage.get(key, 0), f"{key} of stage {k}")
                               for key in ("tokens", "batch", "ramp"))
        require(tokens > 0 and batch > 0, f"stage {k} has {tokens} tokens in batches of {batch}: "
                "both must be at least 1")
        require(batch % context == 0, f"stage {k}: a batch of {batch} tokens is no whole number of "
                f"sequences of {context}; the next that is: {-(-batch // context) * context}")
        require(0 <= ramp <= tokens and not (ramp and k == 1), f"stage {k} has a ramp of {ramp} "
                f"tokens: it may be as long as the stage, {tokens}, and the first stage has none")
        shares = parse_shares(stage["mixture"], k)
        before = parsed[-1].shares if ramp else shares
        parsed.append(Stage(-(-tokens // batch), batch // context, shares, before,
                            Fraction(ramp, context)))
    require(parsed, "there are no stages: give a recipe, as in python train.py config_demo.py")
    return parsed


def parse_shares(mixture, k):
    """{source: exact share}, adding up to 1, of the mixture of stage k."""
    weights = mixture.values()
    require(all(type(w) in (int, float) and 0 <= w < inf for w in weights) and sum(weights),
            f"stage {k}: the mixture {mixture} must give each source a number, none negative, not "
            "all zero")
    for name in mixture:
        require(type(name) is str and name not in ("", "..") and Path(name).name == name,
                f"stage {k}: the source {name!r} is not a plain folder name")
    exact = {name: Fraction(str(w)) for name, w in mixture.items()}      # 0.7 means 7/10
    return {name: w / sum(exact.values()) for name, w in exact.items()}


def require_int(number, what):
    require(type(number) in (int, float) and number == number // 1,
            f"{what} must be a whole number, got {number!r}")
    return int(number)


def source_names(stages):
    return sorted({name for stage in stages for name in stage.names})


def stage_ends(stages):
    """The steps after which the stages are done."""
    return list(accumulate(stage.steps for stage in stages))


def tokens_after(stages, step, context):
    """Tokens seen when `step` steps are done."""
    tokens = 0
    for stage in stages:
        done = min(step, stage.steps)
        tokens, step = tokens + done * stage.batch * context, step - done
    return tokens


# --------------------------------------------------------------------------------------------------
# Mixing

def target_count(stage, name, n):
    """How many of the first n sequences of a stage should come from source `name`: its share,
    integrated up to n, rounded. Exact."""
    before, share = stage.before.get(name, 0), stage.shares.get(name, 0)
    r = min(n, stage.ramp)
    integral = before * r + share * (n - r)
    if r:
        integral += (share - before) * r * r / (2 * stage.ramp)
    return floor(integral + Fraction(1, 2))


def sequences_per_source(stage, n):
    """How many of the first n sequences of a stage do come from each source, {name: count}.

    Target counts are rounded, so they add up to within M/2 of n for M sources. Those at n - M are
    therefore surely served; a few turns remain, in which sources whose target count has grown give
    one sequence each, in the order of their names.
    """
    names = stage.names
    at = max(0, n - len(names))
    served = {name: target_count(stage, name, at) for name in names}
    left = n - sum(served.values())
    while left:
        at += 1
        for name in names:
            if left and target_count(stage, name, at) > served[name]:
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
    """Elements `indices` (an array of ints below n) of the permutation of range(n) that `key`
    names, in int64.

    An index is a cell (row, column) of a table with a x b >= n cells. A round moves the row by a
    number that depends on the column alone, then the column by one that depends on the row alone.
    Both can be undone, so cells are permuted. A cell beyond n is moved on until it falls below n
    (cycle walking), which is a permutation of range(n) again.
    """
    keys = np.frombuffer(blake2b(repr(key).encode()).digest(), "<u8")         # 8 of them
    a = isqrt(n - 1) + 1
    a, b = np.uint64(a), np.uint64(-(-n // a))
    cell = np.array(indices, np.uint64)
    beyond = np.ones(cell.shape, bool)
    while beyond.any():
        row, column = cell[beyond] // b, cell[beyond] % b
        for k in range(0, 8, 2):
            # % before +: a sum that wraps at 2^64 could not be undone
            row = (row + splitmix64(column, keys[k]) % a) % a
            column = (column + splitmix64(row, keys[k + 1]) % b) % b
        cell[beyond] = row * b + column
        beyond = cell >= n
    return cell.astype(np.int64)


def sequences(stages, windows, seed, step):
    """The batch of optimizer step `step` (from 0): a list of (source name, window). `windows` is
    {name: how many it has}.

    A source's turns are counted through the whole run, across stages: turn j takes element
    j mod W of the permutation of epoch j div W, for W windows.
    """
    already_served, k = Counter(), bisect_right(stage_ends(stages), step)
    for stage in stages[:k]:
        already_served.update(sequences_per_source(stage, stage.steps * stage.batch))
        step -= stage.steps
    first = sequences_per_source(stages[k], step * stages[k].batch)
    last = sequences_per_source(stages[k], (step + 1) * stages[k].batch)
    batch = []
    for name in first:
        turns = np.arange(first[name], last[name]) + already_served[name]
        epochs, indices = np.divmod(turns, windows[name])
        for epoch in np.unique(epochs):
            chosen = permute(indices[epochs == epoch], windows[name], seed, name, int(epoch))
            batch += [(name, int(w)) for w in chosen]
    return batch
