"""lichen's measured choice of types beside llama.cpp's fixed mixtures, at equal bytes.

    python -m bench.quantize

The reference is the model as F16. llama.cpp makes each of its mixtures of it, without and with an importance
matrix; lichen gets the bytes of that file as its budget and the same matrix. All are then scored by the
engine that serves them, on text that neither calibration nor measurement has seen. --dither adds half a
quantization step of noise to the reference first: the default model's matrices lie on the grid of Q4_1, which a
measured choice finds and a fixed mixture does not; with the noise no type has that advantage.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.certificate import certificate, close_certificate, model_file, save
from bench.llama_quantize import MIXTURES, llama_quantize
from bench.numbers import rounded
from bench.peer import ROOT
from bench.table import aligned, quantize_rows
from lichen.devices.probe import probe
from lichen.errors import LichenError
from lichen.quant.allocate import Option
from lichen.quant.choice import is_matrix, kept_type
from lichen.quant.divergence import Logits, Tally, mean_and_error
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFFile, GGUFTensor, open_gguf, write_gguf
from lichen.quant.importance import Importance
from lichen.quant.ledger import Ledger, digest
from lichen.quant.quantize import quantize_file, read_rows
from lichen.runtime.scoring import NativeScorer, stretches

if TYPE_CHECKING:
    from lichen.models.mixture import Mixer

WINDOW, MEASURED_WINDOW = 512, 128
SPEED_ROUNDS = 3
# four from 4.2 to 4.7 bits a weight, and two that are often downloaded
TABLE = ("Q2_K_pure", "Q3_K_pure", "IQ4_XS_pure", "Q4_0_pure", "Q3_K_M", "Q4_K_M")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make all files, score them, print the table and one JSON line, write the result."""
    flags = argparse.ArgumentParser(prog="python -m bench.quantize", description=__doc__)
    flags.add_argument("--model", default="smollm2-135m", help="a GGUF file, or a model of lichen's store")
    flags.add_argument("--mixtures", nargs="+", default=TABLE, choices=MIXTURES)
    flags.add_argument("--dither", action="store_true", help="take the model's grid away first")
    flags.add_argument("--calibration-tokens", type=int, default=64 * WINDOW)
    flags.add_argument("--measure-tokens", type=int, default=4 * MEASURED_WINDOW)
    flags.add_argument("--held-out-tokens", type=int, default=16 * WINDOW)
    flags.add_argument("--span", type=int, default=1)
    flags.add_argument("--threads", type=int, default=probe().physical_cores)
    flags.add_argument("--torch-threads", type=int, default=probe().physical_cores)
    flags.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of texts")
    flags.add_argument("--work", type=Path, default=ROOT / ".build" / "quantize")
    options = flags.parse_args(arguments)
    try:
        record = Run(options).record()
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    print(aligned(quantize_rows(record), left=2))
    wins = {way: sum(row["wins"][way] for row in record["summary"]) for way in ("plain", "imatrix")}
    line = {"bench": "quantize", "result": path.name, "budgets": len(record["summary"]), "lower": wins}
    print(json.dumps(line))
    return 0


# ---- texts ----------------------------------------------------------------------------------------


def calibration_text(data: Path) -> str:
    """The first 60 % of tinyshakespeare, questions of gsm8k's and banking77's training parts."""
    plain = _shakespeare(data)
    return plain[: len(plain) * 6 // 10] + "\n\n" + "\n\n".join(_questions(data, "train", 1500))


def held_out_text(data: Path) -> str:
    """The last 20 % of tinyshakespeare's beginning, and questions of the test parts, in equal parts."""
    plain = _shakespeare(data)
    return plain[len(plain) * 8 // 10 :] + "\n\n" + "\n\n".join(_questions(data, "test", 660))


def _shakespeare(data: Path) -> str:
    return (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")


def _questions(data: Path, part: str, count: int) -> list[str]:
    with (data / "gsm8k" / f"{part}.jsonl").open(encoding="utf-8") as file:
        sums = [json.loads(line)["question"] for line in file][:count]
    with (data / "banking77" / f"{part}.csv").open(encoding="utf-8") as file:
        asked = [row["text"] for row in csv.DictReader(file)]
    return sums + asked[:: max(1, len(asked) // count)][:count]


# ---- the reference --------------------------------------------------------------------------------


def write_reference(model: Path, target: Path, *, dither: bool) -> None:
    """The model with its matrices as F16; dither: plus uniform noise of up to half a step of Q4_1."""
    with open_gguf(model) as file:
        types = {
            name: GGMLType.F16 if is_matrix(tensor) else kept_type(tensor)
            for name, tensor in file.tensors.items()
        }
        if not dither:
            quantize_file(file, target, types)
            return
        source = np.random.default_rng(1)
        items: list[tuple[str, GGMLType, tuple[int, ...], Any]] = []
        for name, tensor in file.tensors.items():
            numbers = read_rows(tensor, tensor.data)
            if tensor.type is GGMLType.Q4_1:
                steps = _steps(tensor)
                numbers += (source.random(numbers.shape, np.float32) - np.float32(0.5)) * steps
            stored = numbers.astype(np.float16) if types[name] is GGMLType.F16 else numbers
            items.append((name, types[name], tensor.shape, stored))
        write_gguf(target, file.metadata, items)


def _steps(tensor: GGUFTensor) -> Any:
    """The step of each weight's block of Q4_1 (its first two bytes, F16): float32 [rows, columns]."""
    blocks = tensor.data.reshape(len(tensor.data), -1, 20)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0].astype(np.float32)
    return np.abs(np.repeat(scales, 32, axis=1))


# ---- the run --------------------------------------------------------------------------------------


class Run:
    """One run over one reference."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.seconds: dict[str, float] = {}
        self.speeds: dict[Any, tuple[float, float]] = {}  # tokens a second, read and made
        options.work.mkdir(parents=True, exist_ok=True)
        self.model = model_file(options.model)
        self.reference = options.work / ("dithered.gguf" if options.dither else "reference.gguf")

    def record(self) -> dict[str, Any]:
        """Everything, in order."""
        birth = certificate(self.model)
        self._timed(
            "reference", lambda: write_reference(self.model, self.reference, dither=self.options.dither)
        )
        import torch

        torch.set_num_threads(self.options.torch_threads)
        with open_gguf(self.reference) as file:
            weights = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
            importance = self._timed("importance", lambda: self._importance(file))
            files = self._timed("llama.cpp", lambda: self._peers(importance))
            ours, check = self._mixtures(file, importance, _budgets(files))
        scores = self._timed("scores", lambda: self._scores({**files, **ours}))
        self._timed("speeds", lambda: self._speeds({**files, **ours}))
        close_certificate(birth)
        names = (
            "mixtures",
            "dither",
            "calibration_tokens",
            "measure_tokens",
            "held_out_tokens",
            "span",
            "threads",
        )
        return {
            "kind": "quantize_dithered" if self.options.dither else "quantize",
            "status": "ok",
            "birth": birth,
            "servers": {},
            "runs": [],
            "settings": {name: getattr(self.options, name) for name in names},
            "seconds": {name: rounded(value, 1) for name, value in self.seconds.items()},
            "reference": {
                "bytes": self.reference.stat().st_size,
                "weights": weights,
                **scores["reference"].result(),
            },
            "proxy": check,
            "summary": [self._row(name, {**files, **ours}, scores) for name in self.options.mixtures],
        }

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        print(f"{name}…", file=sys.stderr, flush=True)
        started = time.monotonic()
        found = work()
        self.seconds[name] = time.monotonic() - started
        return found

    def _tokens(self, text: str) -> list[int]:
        scorer = NativeScorer(self.model, window=WINDOW, threads=self.options.threads)
        try:
            return scorer.model.tokenize(text, special=False, add_bos=False)
        finally:
            scorer.close()

    def _importance(self, file: GGUFFile) -> Importance:
        from lichen.models.calibrate import gather_importance
        from lichen.models.load import build_model

        tokens = self._tokens(calibration_text(self.options.data))
        windows = stretches(tokens, WINDOW, self.options.calibration_tokens // WINDOW)
        return gather_importance(build_model(file), windows, text="shakespeare, gsm8k, banking77")

    def _peers(self, importance: Importance) -> dict[tuple[str, str], Path]:
        """llama.cpp's files, plain and with the importance matrix."""
        files = {}
        for name in self.options.mixtures:
            for way, matrix in (("plain", None), ("imatrix", importance)):
                path = self.options.work / f"llama-{name}-{way}.gguf"
                llama_quantize(self.reference, path, name, matrix, threads=self.options.threads)
                files[name, way] = path
        return files

    def _mixtures(
        self, file: GGUFFile, importance: Importance, budgets: Mapping[str, int]
    ) -> tuple[dict[tuple[str, str], Path], dict[str, Any]]:
        """lichen's files for the same bytes, and how well single tensors were rated."""
        from lichen.models.load import build_model
        from lichen.models.mixture import Mixer
        from lichen.models.sensitivity import Measure

        tokens = self._tokens(calibration_text(self.options.data))
        parts = stretches(tokens, MEASURED_WINDOW, self.options.measure_tokens // MEASURED_WINDOW)
        facts = b"".join(importance[name].tobytes() for name in sorted(importance))
        ledger = Ledger(self.options.work, digest(self.reference.name, str(parts), facts))
        measure = Measure(build_model(file), parts)
        mixer = Mixer(file, measure, importance, span=self.options.span, ledger=ledger, tell=_tell)
        ratings: Mapping[str, Sequence[Option]] = self._timed("ratings", mixer.ratings)
        check = self._timed("check of the ratings", lambda: _check(mixer, ratings))
        files: dict[tuple[str, str], Path] = {}
        for name, budget in budgets.items():
            path = self.options.work / f"lichen-{name}.gguf"
            mixture = self._timed(f"choice {name}", partial(mixer.choose, budget, ratings))
            print(f"{name}: KL {mixture.predicted:.4g} -> {mixture.measured:.4g}", file=sys.stderr)
            quantize_file(file, path, mixture.types, importance=importance)
            files[name, "lichen"] = path
        return files, check

    def _scores(self, files: Mapping[tuple[str, str], Path]) -> dict[Any, Tally]:
        """Of the reference and every file, on the held-out text, by the engine."""
        tokens = self._tokens(held_out_text(self.options.data))
        parts = stretches(tokens, WINDOW, self.options.held_out_tokens // WINDOW)
        expected: list[Logits] = []
        tallies: dict[Any, Tally] = {}
        wanted: dict[Any, Path] = {"reference": self.reference, **files}
        for key, path in wanted.items():
            print(f"  {key}", file=sys.stderr, flush=True)
            tally = tallies[key] = Tally()
            scorer = NativeScorer(path, window=WINDOW, threads=self.options.threads)
            for index, part in enumerate(parts):
                logits = scorer.logits(part)[:-1]
                if key == "reference":
                    expected.append(logits)
                tally.add(logits, part[1:], None if key == "reference" else expected[index])
            scorer.close()
        return tallies

    def _speeds(self, files: Mapping[tuple[str, str], Path]) -> None:
        """Of every file, the best of SPEED_ROUNDS rounds over all of them: other work disturbs all alike."""
        prompt = self._tokens(held_out_text(self.options.data))[:WINDOW]
        for _ in range(SPEED_ROUNDS):
            for key, path in files.items():
                scorer = NativeScorer(path, window=WINDOW, threads=self.options.threads)
                read, made = scorer.speed(prompt)
                scorer.close()
                before = self.speeds.get(key, (0.0, 0.0))
                self.speeds[key] = max(before[0], read), max(before[1], made)

    def _row(
        self, name: str, files: Mapping[tuple[str, str], Path], scores: Mapping[Any, Tally]
    ) -> dict[str, Any]:
        """One budget. lower: mean change of the loss from llama.cpp's file to lichen's, nats a token."""
        ways = ("plain", "imatrix", "lichen")
        row: dict[str, Any] = {"budget": name}
        for way in ways:
            row[way] = {"bytes": files[name, way].stat().st_size, **scores[name, way].result()}
            row[way]["prompt_tokens_s"], row[way]["tokens_s"] = self.speeds[name, way]
        row["lower"], row["wins"] = {}, {}
        for way in ("plain", "imatrix"):
            pairs = zip(scores[name, "lichen"].losses, scores[name, way].losses, strict=True)
            mean, error = mean_and_error([ours - theirs for ours, theirs in pairs])
            row["lower"][way] = {"mean": mean, "error": error}
            row["wins"][way] = row["lichen"]["perplexity"] < row[way]["perplexity"]
        return row


def _budgets(peers: Mapping[tuple[str, str], Path]) -> dict[str, int]:
    """Bytes of the smaller of llama.cpp's two files: with importance it may choose other types."""
    sizes: dict[str, int] = {}
    for (name, _), path in peers.items():
        sizes[name] = min(path.stat().st_size, sizes.get(name, path.stat().st_size))
    return sizes


def _tell(what: str, done: int, of: int) -> None:
    if done % 10 == 0:
        print(f"  {what} {done} of {of}", file=sys.stderr, flush=True)


def _check(mixer: Mixer, ratings: Mapping[str, Sequence[Option]]) -> dict[str, Any]:
    """Ratings of tensors and types drawn by chance beside their measured KL."""
    source = np.random.default_rng(2)
    names = sorted(ratings)
    pairs: list[dict[str, Any]] = []
    for _ in range(16):
        name = names[source.integers(len(names))]
        options = [option for option in ratings[name] if option.cost > 1e-6]  # above rounding
        if not options:
            continue
        option = options[source.integers(len(options))]
        found = mixer.measured({name: option.type})
        pairs.append({"tensor": name, "type": option.type.name, "rated": option.cost, "measured": found})
    logs = np.log([[pair["rated"], max(pair["measured"], 1e-8)] for pair in pairs])
    return {
        "pairs": pairs,
        "correlation_of_logs": float(np.corrcoef(logs.T)[0, 1]),
        "median_ratio": float(np.exp(np.median(logs[:, 1] - logs[:, 0]))),
    }


if __name__ == "__main__":
    sys.exit(main())
