"""Proofs of data.py: what is on disk comes back, and the order of training is what its docstring
promises."""
import json
import random
import resource
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256

import numpy as np
import pytest

from data import (
    IGNORED,
    Header,
    Source,
    parse_stages,
    permute,
    read_header,
    sequences,
    sequences_per_source,
    token_writer,
)
from files import InputError

MODEL = b"any bytes do for a tokenizer: only their hash is read"
HEADER = Header(vocab_size=500, bos_id=1, eos_id=2, tokenizer_sha256=sha256(MODEL).hexdigest())


def write_source(folder, *files, header=HEADER, masks=()):
    """A source whose train files hold these token lists, and which masks there are."""
    folder.mkdir(parents=True)
    for k, ids in enumerate(files):
        with token_writer(folder / f"train_{k:05d}.bin", header) as writer:
            writer.write(np.asarray(ids, header.dtype).tobytes())
    (folder / "tokenizer.model").write_bytes(MODEL)
    part = {"documents": 1, "tokens": sum(map(len, files)), "bytes": 9}
    for k, mask in enumerate(masks):
        (folder / f"train_{k:05d}.mask").write_bytes(bytes(mask))
        part |= {"learned_tokens": sum(map(sum, masks)), "learned_bytes": 5}
    (folder / "source.json").write_text(json.dumps(
        {"train": part, "val": {"documents": 0, "tokens": 0, "bytes": 0}}))
    return folder


# --------------------------------------------------------------------------------------------------
# Token files

@pytest.mark.parametrize("vocab_size, itemsize", [(500, 2), (65_536, 2), (65_537, 4)])
def test_tokens_come_back(vocab_size, itemsize, tmp_path):
    """uint16 wraps silently at 65,536; a count in one int32 word would at 2^31."""
    header = Header(vocab_size, 1, 2, HEADER.tokenizer_sha256)
    ids = [0, 1, 2, vocab_size - 1]
    with token_writer(tmp_path / "x.bin", header) as writer:
        for part in ids[:2], ids[2:]:
            writer.write(np.array(part, header.dtype).tobytes())
    assert read_header(tmp_path / "x.bin") == replace(header, tokens=4)
    assert np.fromfile(tmp_path / "x.bin", f"<u{itemsize}", offset=1024).tolist() == ids
    words = np.frombuffer(replace(header, tokens=5 * 2 ** 32 + 7).pack(), "<i4")
    assert (words[:8].tolist() == [20240104, 1, itemsize, vocab_size, 7, 5, 1, 2]
            and not words[16:].any())
    assert words[8:16].tobytes().hex() == HEADER.tokenizer_sha256


def test_nothing_half_written_is_left(tmp_path):
    """A killed or failed writer must not leave a file that looks whole, nor one that lies about."""
    with pytest.raises(ZeroDivisionError), token_writer(tmp_path / "x.bin", HEADER) as file:
        file.write(bytes(6))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path):
    """Each would otherwise train, on garbage."""
    path = write_source(tmp_path / "s", list(range(100))) / "train_00000.bin"
    whole = bytearray(path.read_bytes())

    def refused(raw, words):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=words) as error:
            Source(tmp_path / "s", "train", 8)
        assert str(path) in str(error.value)

    refused(whole[:-2], "truncated")
    refused(whole[:1000], "truncated")
    path.write_bytes(whole)
    (tmp_path / "s/tokenizer.model").unlink()
    with pytest.raises(InputError, match="has no tokenizer.model: prepare the source again"):
        Source(tmp_path / "s", "train", 8)
    (tmp_path / "s/tokenizer.model").write_bytes(MODEL)
    refused(b"", "truncated")
    refused(whole + b"xx", "too long")
    refused(b"LITPKDS\0" + whole[8:], "magic")
    refused(whole[:4] + b"\2\0\0\0" + whole[8:], "version 2")
    refused(whole[:8] + b"\4\0\0\0" + whole[12:], "4 bytes per token")
    refused(whole[:24] + b"\xff\xff\0\0" + whole[28:], "BOS 65535")
    refused(whole[:40] + b"\0\0\0\0" + whole[44:], "another tokenizer")
    path.write_bytes(whole[:1024 + 60] + b"\xff\xff" + whole[1024 + 62:])
    source = Source(tmp_path / "s", "train", 8)
    source.window(2)
    with pytest.raises(InputError, match="65535 between tokens"):
        source.window(3)


def test_incomplete_sources_are_refused(tmp_path):
    """A lost file would shorten an epoch in silence."""
    with pytest.raises(InputError, match="prepare.py tokenize"):
        Source(tmp_path / "nothing", "train", 8)
    with pytest.raises(InputError, match="prepare.py demo"):
        Source(tmp_path / "demo-prose", "train", 8)
    folder = write_source(tmp_path / "s", list(range(100)), list(range(50)))
    (folder / "train_00001.bin").unlink()
    with pytest.raises(InputError, match="counts 150 tokens for train, its files hold 100"):
        Source(folder, "train", 8)
    (folder / "source.json").unlink()
    with pytest.raises(InputError, match="source.json"):
        Source(folder, "train", 8)


# --------------------------------------------------------------------------------------------------
# Windows

@pytest.mark.parametrize("lengths", [[41], [17, 24], [1, 5, 0, 30, 5], [8, 8, 8, 17], [3, 3]])
def test_every_token_is_a_target_once(lengths, tmp_path):
    """Tokens that are their own position prove alignment, also across files: y is x moved by one,
    and nothing is skipped."""
    ids = list(range(sum(lengths)))
    cuts = np.cumsum([0, *lengths])
    source = Source(write_source(tmp_path / "s", *(ids[a:b] for a, b in zip(cuts, cuts[1:]))),
                    "train", 8)
    windows = [source.window(i).tolist() for i in range(source.windows)]
    assert all(len(window) == 9 for window in windows)
    targets = [y for window in windows for y in window[1:]]
    assert targets == ids[1:1 + len(targets)] and len(ids) - 1 - len(targets) < 8


@pytest.mark.parametrize("lengths", [[41], [17, 24], [1, 5, 0, 30, 5], [8, 8, 8, 17]])
def test_marks_stay_with_their_tokens(lengths, tmp_path):
    """A mask moved by one, as targets are, or read from another file's beginning, teaches the last
    word of each question and never the end of an answer."""
    rng, cuts = random.Random(0), np.cumsum([0, *lengths])
    marks = rng.choices([0, 1], k=41)
    parts = [(list(range(a, b)), marks[a:b]) for a, b in zip(cuts, cuts[1:])]
    source = Source(write_source(tmp_path / "s", *(ids for ids, _ in parts),
                                 masks=[mask for _, mask in parts]), "train", 8)
    examples = [source.example(i) for i in range(source.windows)]
    assert np.concatenate(examples, 1).tolist() == [
        [*range(40)], [i if marks[i] else IGNORED for i in range(1, 41)]]
    assert (source.learned_tokens, source.learned_bytes) == (sum(marks), 5)
    plain = Source(write_source(tmp_path / "p", list(range(41))), "train", 8)
    assert plain.example(1).tolist() == [[*range(8, 16)], [*range(9, 17)]]
    assert (plain.learned_tokens, plain.learned_bytes) == (41, 9)


# --------------------------------------------------------------------------------------------------
# Shuffling

@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 9973])
def test_shuffled_is_a_permutation(n):
    """Any round that cannot be undone repeats some windows and never shows others."""
    assert sorted(permute(np.arange(n), n, 3407, "name", 0)) == list(range(n))


def test_orders_differ_and_any_index_stands_alone():
    """The original read the same file order every epoch; and an order that must be computed as a
    whole cannot be resumed."""
    orders = {key: tuple(permute(np.arange(1000), 1000, *key)) for key in
              [(1, "a", 0), (1, "a", 1), (2, "a", 0), (1, "b", 0)]}
    assert len(set(orders.values())) == 4
    for order in orders.values():         # no two agree, none is the identity, more than by chance
        assert sum(i == w for i, w in enumerate(order)) < 10
    some = [7, 999, 0, 512]
    assert [orders[1, "a", 0][i] for i in some] == permute(some, 1000, 1, "a", 0).tolist()


def test_shuffled_looks_uniform():
    """A permutation that keeps neighbours together trains on pieces of one document a batch. Where
    element 0 lands, and how far apart 0 and 1 land, over 4,000 keys: chi square of 20 bins, 19
    degrees of freedom, 99.9 % point 43.8."""
    landed = np.array([permute([0, 1], 1000, seed, "x", 0) for seed in range(4000)])
    for values in landed[:, 0], (landed[:, 1] - landed[:, 0]) % 1000:
        observed = np.bincount(values * 20 // 1000, minlength=20)
        assert ((observed - 200) ** 2 / 200).sum() < 43.8


# --------------------------------------------------------------------------------------------------
# Mixing

def random_recipe(rng):
    """1 to 4 stages over 1 to 6 sources, shares from and to zero, ramps, and small sources that
    have many epochs: (stages, {source: windows})."""
    stages, context, windows = random_stages(rng)
    return parse_stages(stages, context), windows


def random_stages(rng):
    T = rng.choice([4, 8])
    pool = [f"s{k}" for k in range(rng.randint(1, 6))]
    stages = []
    for k in range(rng.randint(1, 4)):
        names = rng.sample(pool, rng.randint(1, len(pool)))
        mixture = {name: rng.choice([0, 1, 0.693584, 0.306416, rng.random()]) for name in names}
        mixture[names[0]] = mixture[names[0]] or 0.5
        batch = T * rng.randint(1, 20)
        tokens = rng.randint(1, 25 * batch)
        stages.append({"tokens": tokens, "batch": batch, "mixture": mixture})
        if k and rng.random() < 0.7:
            stages[-1]["ramp"] = rng.randint(1, tokens)
    return stages, T, {name: rng.choice([1, 2, 7, 50, 1000]) for name in pool}


def share_after(stage, name, n):
    """The integrated share, by the trapezoid rule, which is exact for straight lines."""
    before, after = stage.before.get(name, Fraction(0)), stage.shares.get(name, Fraction(0))
    r = min(Fraction(n), stage.ramp)
    end = before + (after - before) * r / stage.ramp if stage.ramp else after
    return (before + end) / 2 * r + after * (n - r)


@pytest.mark.parametrize("seed", range(40))
def test_sources_keep_their_shares(seed):
    """Differences of rounded shares go back by one now and then; a source must never give more or
    less than (K - 1)/2 besides its share, at any step of a stage, and nothing when it has none."""
    stages, _ = random_recipe(random.Random(seed))
    for stage in stages:
        K, last = len(stage.names), dict.fromkeys(stage.names, 0)
        for n in range(0, stage.steps * stage.batch + 1):
            now = sequences_per_source(stage, n)
            assert sum(now.values()) == n
            for name in stage.names:
                assert now[name] >= last[name]
                assert abs(now[name] - share_after(stage, name, n)) <= Fraction(K - 1, 2)
                assert now[name] == 0 or stage.shares.get(name) or stage.before.get(name)
            last = now


@pytest.mark.parametrize("seed", range(40))
def test_every_window_once_an_epoch(seed):
    """Across stages, batches and epochs: the j-th window a source gives belongs to epoch j div W,
    and each epoch is whole."""
    stages, windows = random_recipe(random.Random(seed))
    given = {name: [] for name in windows}
    steps = [stage.batch for stage in stages for _ in range(stage.steps)]
    for step, size in enumerate(steps):
        rows = sequences(stages, windows, 3407, step)
        assert len(rows) == size
        for name, w in rows:
            given[name].append(w)
    for name, order in given.items():
        W = windows[name]
        epochs = [order[i:i + W] for i in range(0, len(order), W)]
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(W))
        if W >= 50 and len(epochs) > 2:
            assert epochs[0] != epochs[1]
    with pytest.raises(IndexError):
        sequences(stages, windows, 3407, len(steps))


def test_a_step_follows_from_its_number_alone():
    """Asked in any order, again, or after a later stage was changed, a step is the same: forks
    share their past."""
    rng = random.Random(5)
    stages, windows = random_recipe(rng)
    stages = stages[:1] + [stages[0]]
    steps = list(range(stages[0].steps * 2))
    forward = {step: sequences(stages, windows, 1, step) for step in steps}
    for step in rng.sample(steps, len(steps)):
        assert sequences(stages, windows, 1, step) == forward[step]
    other = stages[:1] + [parse_stages([{"tokens": 400, "batch": 40,
                                        "mixture": {name: 1 for name in windows}}], 4)[0]]
    for step in range(stages[0].steps):
        assert sequences(other, windows, 1, step) == forward[step]
    assert (sequences(stages, {name: 1000 for name in windows}, 1, 0)
            != sequences(stages, {n: 1000 for n in windows}, 2, 0))


def test_a_trillion_windows_cost_nothing():
    """An order that is stored, or replayed, makes the end of a long run unreachable."""
    stages = parse_stages([{"tokens": 3e15, "batch": 2 ** 21,
                            "mixture": {"big": 0.7, "small": 0.3}}], 2048)
    windows = {"big": 10 ** 12, "small": 3}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = sequences(stages, windows, 3407, stages[0].steps - 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert len(rows) == 1024 and len({w for name, w in rows if name == "big"}) in (716, 717, 718)


def test_stages_of_the_paper():
    """v1.1: 1.5T, 350B and 150B tokens, the last at four times the batch; floats like 1.5e12 are
    exact counts."""
    mixture = {"slimpajama": 0.75, "starcoder": 0.15, "proof-pile-2": 0.1}
    stages = parse_stages([{"tokens": 1.5e12, "batch": 1_835_008, "mixture": {"slimpajama": 1}},
                           {"tokens": 350e9, "batch": 1_835_008, "mixture": mixture, "ramp": 6e9},
                           {"tokens": 150e9, "batch": 4 * 1_835_008, "mixture": mixture}], 2048)
    assert [stage.steps for stage in stages] == [817_436, 190_735, 20_436]
    assert (stages[1].before == {"slimpajama": 1}
            and stages[1].shares["starcoder"] == Fraction(3, 20))


@pytest.mark.parametrize("change, words", [
    ({"batch": 100}, "batch of 100 tokens.*of 8.*104"), ({"tokens": 0}, "0 tokens"),
    ({"tokens": 2.5}, "2.5"), ({"batch": -8}, "-8"), ({"mixture": {"a": -1}}, "-1"),
    ({"mixture": {"a": 0}}, "not all zero"), ({"mixture": {}}, "not all zero"),
    ({"mixture": {"a": "x"}}, "a number"), ({"mixture": {"a": True}}, "a number"),
    ({"mixture": {3: 1}}, "plain folder name"), ({"mixture": {"a": float("nan")}}, "nan"),
    ({"mixture": "a"}, "dict"), ({"ramp": 64}, "first"), ({"rmap": 64}, "rmap"),
    ({"tokens": True}, "True"), ({"mixture": {"": 1}}, "'' is not a plain folder name"),
    ({"mixture": {"..": 1}}, "plain folder name"), ({"tokens": None}, "None"),
    ({"tokens": float("inf")}, "inf")])
def test_bad_stages_are_refused(change, words):
    """Each would train on something, and not on what was meant."""
    with pytest.raises(InputError, match=words):
        parse_stages([{"tokens": 800, "batch": 80, "mixture": {"a": 1}} | change], 8)


def test_a_ramp_longer_than_its_stage_is_refused():
    """It would end nowhere; and a negative one turned counts negative."""
    stage = {"tokens": 800, "batch": 80, "mixture": {"a": 1}}
    with pytest.raises(InputError, match="ramp of 801.*800"):
        parse_stages([stage, stage | {"ramp": 801}], 8)
    with pytest.raises(InputError, match="ramp of -80"):
        parse_stages([stage, stage | {"ramp": -80}], 8)
    with pytest.raises(InputError, match="no stages"):
        parse_stages([], 8)
