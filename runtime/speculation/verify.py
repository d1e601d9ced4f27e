"""The one rule of speculation: draw at each drafted position, and go on while the draw equals the draft.

The model computes the last known token and the draft behind it in one step, so that the logits after each
of them are those of plain decoding. Each draw goes through the request's own chain (`Drawing.draw`: grammar,
bias, penalties, temperature, seed), in the order of plain decoding, and only what was drawn is kept. So
nothing depends on how good a draft is but speed, and no rejection sampling (arXiv 2211.17192) is needed:
a drafted token is a guess at the draw, not a draw itself. Up to floating-point near-ties between the shapes
of steps, a seed gives the tokens that it would give without speculation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def verify(draft: Sequence[int], draw: Callable[[int], int | None]) -> int:
    """How many tokens of `draft` were right, after as many draws and one more.

    draw(i) draws the token that follows draft[:i], hands it on, and returns it; None where the answer has
    ended with it, and whatever is left of the draft is dropped.
    """
    for position, guess in enumerate(draft):
        if draw(position) != guess:
            return position
    draw(len(draft))
    return len(draft)
