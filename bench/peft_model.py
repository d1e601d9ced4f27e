"""What transformers and PEFT make of the same lessons: the peer of the measurements of learning.

The model is dequantized to float32 by transformers itself, PEFT's LoRA stands on the same layers with the same rank and
scale, and its first A is copied from lichen's, so that both begin with the same numbers. Examples are padded to the
longest of a batch, as a data collator does it, and the loss is on answers only. Optimizer, rates and order are lichen's.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lichen.adapters.course import Course, rate_at
from lichen.adapters.lora import adapted
from lichen.adapters.task import Example, LoRAOptions, Task
from lichen.adapters.train import BETAS, NORM, RATES
from lichen.models.decoder import Decoder

NAMES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
IGNORED = -100  # label of a token that is not learned


class PeftLearner:
    """A model with PEFT's LoRA, and AdamW over it."""

    def __init__(self, path: Path, task: Task, first: int) -> None:
        """first: the lowest block that is adapted."""
        from peft import LoraConfig, get_peft_model

        os.environ["HF_HUB_OFFLINE"] = "1"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers and PEFT, which are not ours to mend
            base = _transformers_model(path)
            layers = list(range(first, base.config.num_hidden_layers))
            self.model: Any = get_peft_model(base, _config(LoraConfig, task.lora, layers))
        self.model.train()  # PEFT's dropout is 0
        self.task, self.step = task, 0
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.begin()

    def begin(self) -> None:
        """A new lesson: the optimizer forgets, the adapter stays."""
        self.step = 0
        rate = self.task.rate or RATES[self.task.objective]
        self._optimizer = torch.optim.AdamW(self._trained, lr=rate, betas=BETAS, weight_decay=0.0)
        self._rate = rate

    def copy_start(self, model: Decoder) -> None:
        """Take over A and B of a model of lichen's, whose queries and keys are in another order of rows; only
        for an adapter that has learned nothing yet, since there B is zero in any order."""
        theirs = dict(self.model.named_parameters())
        for name, layer in adapted(model):
            _, block, part = name.split(".")
            place = "self_attn" if part.startswith("attn") else "mlp"
            stem = f"base_model.model.model.layers.{block}.{place}.{NAMES[part]}"
            theirs[f"{stem}.lora_A.default.weight"].data.copy_(layer.a.data)
            assert not layer.b.any(), "it has learned something already"

    def learn(self, examples: Sequence[Example], steps: int, seed: int) -> None:
        """So many steps over a lesson, in the order that lichen takes."""
        course = Course(len(examples), self.task.batch, seed)
        self.begin()
        while self.step < steps:
            self.advance([examples[number] for number in course.next()], steps)

    def advance(self, chosen: Sequence[Example], steps: int) -> float:
        """One step; its loss in nats an answer token."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(self.step, steps, self._rate)
        loss = self.loss(chosen)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._trained, NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return float(loss.detach())

    def loss(self, chosen: Sequence[Example]) -> Tensor:
        """As transformers computes it: logits at all positions, the mean over labels that count."""
        tokens, mask, labels = _padded(chosen)
        found: Tensor = self.model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        return found

    def score(self, examples: Sequence[Example]) -> tuple[float, float]:
        """Share of answers that greedy decoding gives word for word, and nats a token of them."""
        exact, lost, count = 0, 0.0, 0
        ordered = sorted(examples, key=lambda example: len(example.prompt) + len(example.answer))
        for start in range(0, len(ordered), 4):
            part = ordered[start : start + 4]
            tokens, mask, labels = _padded(part)
            with torch.no_grad():
                logits = self.model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
            wanted = labels[:, 1:]
            learned = wanted != IGNORED
            exact += int(((logits.argmax(-1) == wanted) | ~learned).all(-1).sum())
            lost += float(functional.cross_entropy(logits[learned], wanted[learned], reduction="sum"))
            count += int(learned.sum())
        return exact / len(examples), lost / count

    @property
    def bytes(self) -> int:
        """Of the adapter in float32."""
        return sum(4 * parameter.numel() for parameter in self._trained)


def _config(kind: Any, lora: LoRAOptions, layers: list[int]) -> Any:
    return kind(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=[NAMES[target] for target in lora.targets],
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )


def _transformers_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)


def _padded(chosen: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and labels, each int64 [examples, longest], padded on the right."""
    longest = max(len(example.prompt) + len(example.answer) for example in chosen)
    tokens = torch.zeros(len(chosen), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORED)
    for row, example in enumerate(chosen):
        whole = [*example.prompt, *example.answer]
        tokens[row, : len(whole)] = torch.tensor(whole)
        mask[row, : len(whole)] = 1
        labels[row, len(example.prompt) : len(whole)] = torch.tensor(example.answer)
    return tokens, mask, labels
