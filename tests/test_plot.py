"""Proofs of plot.py: what is drawn is what metrics.jsonl says."""
import hashlib
import json
import warnings

import pytest

import plot

START = {"step": 0, "tokens": 0, "val_loss": {"a": 9.0}, "bits_per_byte": {"a": 4.0}}
STEPS = [{"step": k, "tokens": 100 * k, "loss": 9.0 - k, "lr": 1e-3, "grad_norm": 1.0, "stage": 1,
          "tokens_per_second": 50.0, "mfu": None, "memory": 1, "mixture": {"a": 1.0}}
         for k in (1, 2)]
LATER = [step | {"step": k, "tokens": 200 + 400 * (k - 2), "stage": 2,
                 "mixture": {"a": 0.5, "b": 0.5}, "val_loss": {"a": 5.0, "b": 6.0},
                 "bits_per_byte": {"a": 2.0, "b": 3.0}} for k, step in zip((3, 4), STEPS)]
RECORDS = [START, *STEPS, *LATER]


@pytest.fixture
def run(tmp_path):
    def run(name, records, tail=""):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records) + tail
        (tmp_path / name / "metrics.jsonl").write_text(lines)
        return str(tmp_path / name)
    return run


def test_values_are_the_records():
    """A source that came later has no validation before it, but its share was zero."""
    assert plot.read_series(RECORDS, "loss") == ([100, 200, 600, 1000], [8.0, 7.0, 8.0, 7.0])
    assert plot.read_series(RECORDS, "mfu") == ([], [])
    assert plot.read_series(RECORDS, "bits_per_byte", "b") == ([600, 1000], [3.0, 3.0])
    assert (plot.read_series(RECORDS, "mixture", "b", default=0.0)
            == ([100, 200, 600, 1000], [0.0, 0.0, 0.5, 0.5]))


def test_stages_begin_where_the_one_before_ended():
    """The batch of a stage is its tokens over its steps; taken from its own lines alone, the first
    interval would be lost."""
    stages = plot.find_stages(RECORDS)
    assert {k: (a["tokens"], b["tokens"]) for k, (a, b) in stages.items()} == {
        1: (0, 200), 2: (200, 1000)}
    assert plot.find_stages(LATER)[2] == (LATER[0], LATER[1])           # a fork without validation
    assert plot.find_stages(STEPS)[1] == ({"step": 0, "tokens": 0}, STEPS[1])


@pytest.mark.parametrize("tokens, text", [(0, "0"), (2_000, "2k"), (1.5e6, "1.5M"), (350e9, "350B"),
                                          (2e12, "2T")])
def test_tokens_are_written_as_people_say_them(tokens, text):
    """An axis of 1e12 says nothing."""
    assert plot.format_count(tokens) == text


def test_a_picture_is_drawn(run, tmp_path, capsys):
    """Of one run, of several, of one that is still writing its last line; and nothing else is left
    behind."""
    pytest.importorskip("matplotlib")
    one, two = run("one", RECORDS, tail='{"step": 5'), run("two", RECORDS[2:4])
    plot.main([one])
    assert capsys.readouterr().out == f"{one}/plot.png\n"
    plot.main([one, two, f"--out={tmp_path / 'both.png'}"])
    three = run("three", [{k: v for k, v in STEPS[0].items() if k != "mixture"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")                     # no validation, and a single step
        plot.main([three])
    (tmp_path / "three/plot.png").unlink()
    for path, data in ((tmp_path / "one/plot.png", [RECORDS]),
                       (tmp_path / "both.png", [RECORDS, RECORDS[2:4]])):
        picture, sha256 = path.read_bytes(), hashlib.sha256(json.dumps(data).encode()).hexdigest()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
        assert sha256.encode() in picture                  # else nobody knows of which run it is
    with pytest.raises(SystemExit):
        plot.main([one, f"--out={tmp_path / 'x.jpg'}"])
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {
        "plot.png", "both.png", "metrics.jsonl"}
    with pytest.raises(FileNotFoundError, match="nowhere/x.png'$"):
        plot.main([one, f"--out={tmp_path}/nowhere/x.png"])


def test_what_is_no_run_is_refused(run, tmp_path):
    """One sentence each."""
    for folder, words in ((str(tmp_path / "no"), "there is no .*no/metrics.jsonl"),
                          (run("start", [START]), "has no step yet"),
                          (run("other", RECORDS, tail="[1]\n"), "line 6 is no record"),
                          (run("odd", RECORDS, tail='{"step": 1, "tokens": 2, "mixture": null}\n'),
                           "line 6 is no record")):
        with pytest.raises(SystemExit, match=words):
            plot.main([folder])
