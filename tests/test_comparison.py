"""Two sides' logits compared: torch's own divergence in float64 is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolkit.evaluate.parity import Comparison


@pytest.mark.parametrize(("apart", "limit"), [(1e-6, 1e-12), (1e-2, 1e-9), (0.3, 1e-6), (3.0, 1e-5)])
def test_divergences_are_torchs(apart: float, limit: float) -> None:
    """Both where a difference is next to nothing, and where float32 is enough; the largest logits stand far apart."""
    random, width = np.random.default_rng(1), 5000
    expected = (4 * random.standard_normal((12, width)) + 30 * random.standard_normal((12, 1))).astype(np.float32)
    actual = (expected + apart * random.standard_normal(expected.shape)).astype(np.float32)
    ids = random.integers(0, width, 12).tolist()
    made = Comparison()
    made.add(expected, actual, ids)
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (expected, actual))
    klds = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    figures = made.figures()
    assert figures.mean_kld == pytest.approx(float(klds.mean()), abs=limit, rel=1e-5)
    assert figures.median_kld == pytest.approx(float(klds.quantile(0.5)), abs=limit, rel=1e-5)
    losses = [-side[range(11), ids[1:]].mean() for side in (q, p)]
    assert np.log(figures.perplexity) == pytest.approx(float(losses[0]), abs=1e-6)
    assert np.log(made.reference_perplexity) == pytest.approx(float(losses[1]), abs=1e-6)
    assert figures.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert figures.max_abs_logit_error == float(np.abs(expected - actual).max())
