"""Proofs of check.py: what is wrong is found, and is BAD."""
from functools import partial

import pytest
import torch

import check
import model

CPU, FP32 = torch.device("cpu"), torch.float32
errors = partial(check.attention_errors, CPU, FP32, 1)


@pytest.mark.parametrize("how", [(40, 40, False, True), (8, 40, True), (1, 40, True),
                                 (40, 40, True)])
def test_attention_is_right_and_a_leak_is_found(how, monkeypatch):
    """A check that compares a kernel with itself, or by too wide a limit, finds nothing: here one
    query sees one key too many, a single head is another's, or a gradient is a tenth too large."""
    right = model.attention
    assert 0 < max(errors(*how).values()) < 1e-5

    def leak(q, k, v, mask=None):
        T, S = q.shape[2], k.shape[2]
        seen = torch.ones(T, S, dtype=torch.bool).tril(S - T) if mask is None else mask.clone()
        seen[..., 0, -1] = ~seen[..., 0, -1]
        return right(q, k, v, seen.expand(1, 1, T, S))

    def heads(q, k, v, mask=None):
        return right(q, k, v, mask)[:, [1, 0, *range(2, 32)]]

    for wrong in leak, heads:
        monkeypatch.setattr(model, "attention", wrong)
        assert max(errors(*how).values()) > 1e-2
    if how[-1] is True and len(how) == 4:
        monkeypatch.setattr(model, "attention", lambda q, k, v, mask: right(
            q + 0.1 * (q - q.detach()), k, v))
        assert errors(*how)["output"] < 1e-5 < 1e-2 < errors(*how)["gradient of q"]


@pytest.mark.parametrize("error, status", [
    (1e-6, 0), (0.5, "BAD"), (float("nan"), "BAD"), (RuntimeError("no kernel"), "BAD"),
    (AssertionError(), "BAD")])
def test_what_is_wrong_is_bad(error, status, monkeypatch, capsys):
    """Not a number is not large, and what fails must not end the checks behind it."""
    def attention_errors(device, dtype, B, *how):
        if isinstance(error, Exception):
            raise error
        return {"gradient": 1e-7, "output": 1e-6 if B == 1 else error}

    monkeypatch.setattr(check, "attention_errors", attention_errors)
    monkeypatch.setattr(check, "training_step", lambda *_: {"loss": torch.ones(1)})
    monkeypatch.setattr(check, "text_errors", lambda *_: {"the tokens": 0.0})
    monkeypatch.setattr(check, "compile_error", lambda device: "no compiler")
    with pytest.raises(SystemExit) as end:
        check.main([])
    out = capsys.readouterr().out
    assert (end.value.code == 0) == (status == 0) and ("BAD" in out) == (status == "BAD")
    assert "OK  text, int4 weights" in out and "not compiled: no compiler" in out
