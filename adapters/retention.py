"""What keeps a training from forgetting: replay, steps that hurt neither aim, and a price on what matters.

The keep objective has two parts. On general prompts, the divergence from what the model itself thought possible
(`recall.py`); on examples of earlier lessons, their cross entropy. Its gradient and the lesson's are joined by a
step that does not go against either. `Importance` holds back what answers depend on, also where no replay looks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lichen.adapters.lora import adapted
from lichen.adapters.objectives import Rows, supervised
from lichen.adapters.recall import Recalled
from lichen.models.decoder import Decoder
from lichen.models.loss import sum_of_parts

LEAST = 1e-6  # probability of all but the kept continuations, at the least: its logarithm must be finite


def joined(learn: Tensor, keep: Tensor) -> Tensor:
    """One direction from two gradients, each float32 [parameters] (PCGrad, Yu et al., 2020, arXiv:2001.06782).

    Where they point apart each loses what goes against the other; the sum then lowers both to first order.
    """
    inner = torch.dot(learn, keep)
    if inner >= 0:
        return learn + keep
    return learn + keep - inner / torch.dot(keep, keep) * keep - inner / torch.dot(learn, learn) * learn


def divergence(rows: Rows, numbers: Sequence[int], recalled: Sequence[Recalled], total: int) -> Tensor:
    """KL from what was recalled to the model with its adapters, in nats: the share of a mean over `total` tokens.

    Continuations that were not kept count as one; so it is a lower bound, and zero where nothing changed.
    """
    hidden, where = rows.run(numbers)
    likely = torch.cat([recalled[number].likely for number in numbers]).long()  # [n, TOP]
    logs = torch.cat([recalled[number].logs for number in numbers])  # [n, TOP]
    rest = (1 - logs.exp().sum(-1)).clamp_min(LEAST)  # [n]

    def loss(piece: Tensor, part: slice) -> Tensor:
        now = rows.model.logits(piece).log_softmax(-1).gather(-1, likely[part])
        now_rest = (1 - now.exp().sum(-1)).clamp_min(LEAST)
        kept = (logs[part].exp() * (logs[part] - now)).sum()
        return kept + (rest[part] * (rest[part] / now_rest).log()).sum()

    return sum_of_parts(hidden[where.positions], loss, rows.model.vocabulary) / total


class Importance:
    """How much the model's answers depend on each trained number, and the price of moving it from where it was.

    As in arXiv:2501.13669: element-wise importance F from a record of gradients on general answers, a
    coefficient a layer from its share of all importance, and the penalty sum c_l F_i (theta_i - start_i)^2 / 2.
    F is the diagonal of the Fisher information, since the answers are the model's own; it is scaled so that its
    mean over all numbers is 1.
    """

    def __init__(self, start: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """start: the parameters then; weights: c_l F_i, of the same shapes."""
        self.start, self.weights = list(start), list(weights)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Of the penalty, at the parameters as they are."""
        return [
            weight * (parameter.detach() - start)
            for parameter, start, weight in zip(parameters, self.start, self.weights, strict=True)
        ]
