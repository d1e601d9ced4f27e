"""Draft heads that nobody trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from itertools import pairwise

import numpy as np

from lichen.adapters.draft_head import DraftHead, HeadFacts, HeadWeights


def following_head(texts: Iterable[Items[int]], *, base: str, vocabulary: int, hidden: int) -> DraftHead:
    """Looks only at the last token, and guesses what most often followed it in texts [n] of token ids."""
    follows: dict[int, Counter[int]] = {}
    for tokens in texts:
        for one, two in pairwise(tokens):
            follows.setdefault(one, Counter())[two] += 1
    words = np.array(sorted({*follows, *(two for counts in follows.values() for two in counts)}))
    size = len(words)
    row = {int(word): at for at, word in enumerate(words)}
    step = np.zeros((size, size), np.float32)
    for one, counts in follows.items():
        step[row[counts.most_common(1)[0][0]], row[one]] += 1
        step[row[one], row[one]] -= 1  # what z said of this token is over
    weights = HeadWeights(
        words=words,
        a_weight=np.zeros((size, hidden), np.float32),
        a_bias=np.zeros(size, np.float32),
        w_weight=np.concatenate([np.zeros((size, size)), 8 * np.eye(size)], 1).astype(np.float32),
        w_bias=np.zeros(size, np.float32),
        d_weight=step / np.float32(8),
        table=np.eye(size + 1, size, dtype=np.float32),
        output=16 * np.eye(size, dtype=np.float32),
        output_bias=np.zeros(size, np.float32),
    )
    return DraftHead(HeadFacts(base=base, vocabulary=vocabulary), weights)
