"""Perplexity and KL beside their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest

from lichen.quant.divergence import Tally


def test_sums_are_those_of_the_definitions() -> None:
    source = np.random.default_rng(1)
    own, reference = (source.normal(0, 4, (150, 300)).astype(np.float32) for _ in range(2))
    targets = source.integers(0, 300, 150).tolist()
    tally = Tally()
    tally.add(own, targets, reference)
    found = tally.result()
    p, q = (
        np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
        for logits in (reference, own)
    )
    kls = (p * np.log(p / q)).sum(1)
    losses = -np.log(q[np.arange(150), targets])
    assert found["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert found["kl"] == pytest.approx(kls.mean(), rel=1e-5)
    assert found["kl_error"] == pytest.approx(kls.std(ddof=1) / 150**0.5, rel=1e-4)
    assert found["same_top"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = np.random.default_rng(1).normal(0, 4, (70, 50)).astype(np.float32)
    tally = Tally()
    tally.add(logits, [0] * 70, logits)
    assert tally.result()["kl"] == 0 and tally.result()["same_top"] == 1


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[3e4, -3e4, 0.0]], np.float32)
    tally = Tally()
    tally.add(logits, [0], logits)
    assert tally.result()["perplexity"] == 1


def test_without_a_reference_there_is_no_kl() -> None:
    tally = Tally()
    tally.add(np.zeros((3, 4), np.float32), [0, 1, 2])
    assert "kl" not in tally.result()
    assert tally.result()["perplexity"] == pytest.approx(4)
