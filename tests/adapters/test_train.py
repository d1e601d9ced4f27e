"""Training: it learns, what it computes is what it says, and a killed one ends as if it never was."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch

from lichen.adapters import checkpoint
from lichen.adapters.course import Course, rate_at
from lichen.adapters.events import (
    Event,
    EventLog,
    EventReader,
    Failed,
    Finished,
    Measured,
    Saved,
    Stepped,
    Stopped,
    told,
)
from lichen.adapters.frozen import FrozenStates
from lichen.adapters.launch import CHECKPOINT, EVENTS, STOPPED, Training, prepare
from lichen.adapters.lineage import ADAPTER, MANIFEST, MIDDLE, candidates, lineage_of
from lichen.adapters.lora import without_adapters
from lichen.adapters.lora_file import write_adapter
from lichen.adapters.task import Example, Examples, LoRAOptions, Manifest, Task
from lichen.adapters.train import Trainer
from lichen.adapters.trainer import Run
from lichen.errors import TrainingError
from lichen.models.load import load_model
from lichen.models.packing import pack
from lichen.quant.formats import GGMLType
from tests.adapters.made_adapters import sha256
from tests.models.tiny_models import VOCABULARY, write_tiny


def lessons(count: int, seed: int = 0) -> list[Example]:
    """The answer repeats the question's last two tokens, and ends."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = [source.randrange(259, VOCABULARY) for _ in range(source.randrange(3, 9))]
        found.append(Example(prompt, [*prompt[-2:], 2]))
    return found


def pairs(count: int) -> list[Example]:
    """Preferred is what ends in 2, rejected what ends in 3."""
    return [Example(one.prompt, one.answer, [*one.answer[:-1], 3]) for one in lessons(count)]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights."""
    return write_tiny(tmp_path_factory.mktemp("model") / "m.gguf", "llama", kind=GGMLType.Q4_1)


def task_of(model: Path, folder: Path, **changes: object) -> Task:
    """A small training that keeps a checkpoint after each step."""
    task = Task(
        name="test",
        model=str(model),
        output=str(folder / "out"),
        checkpoint=0,
        tokens=64,
        epochs=2,
        rate=0.01,
        nice=0,
    )
    return msgspec.structs.replace(task, **changes)


EXAMPLES = Examples(train=lessons(40), held_out=lessons(16, seed=1), general=lessons(4, seed=2))


def bits(trainer: Trainer) -> list[bytes]:
    """Every number that is trained."""
    return [values.numpy().tobytes() for values in trainer.state()["adapter"]]


def test_it_learns(model_file: Path, tmp_path: Path) -> None:
    task = task_of(model_file, tmp_path, epochs=8, lora=LoRAOptions(first=0))
    trainer = Trainer(load_model(model_file), task, EXAMPLES, tmp_path)
    before = trainer.measure("before")
    steps = [trainer.advance() for _ in range(trainer.steps)]
    after = trainer.measure("after")
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert before.loss is not None and after.loss is not None and after.loss < 0.9 * before.loss
    assert steps[-1].epoch == 7 and {step.epoch for step in steps} == set(range(8))


def test_fitting_a_training_into_its_time_leaves_nothing_behind(model_file: Path, tmp_path: Path) -> None:
    task = task_of(model_file, tmp_path)
    plain, fitted = (Trainer(load_model(model_file), task, EXAMPLES, tmp_path) for _ in range(2))
    fitted.fit_into(1e6)
    assert fitted.steps == plain.steps == 10
    for _ in range(3):
        plain.advance(), fitted.advance()
    assert bits(plain) == bits(fitted)
    fitted.fit_into(0.0)
    assert fitted.steps == 1


def test_preferences_are_learned_and_the_reference_is_the_model_itself(
    model_file: Path, tmp_path: Path
) -> None:
    task = task_of(model_file, tmp_path, objective="preference", rate=0.003)
    trainer = Trainer(load_model(model_file), task, Examples(train=pairs(24)), tmp_path)
    losses = [trainer.advance().loss for _ in range(trainer.steps)]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # no margin yet: log 2
    assert losses[-1] < 0.9 * losses[0]


def test_the_preference_gradient_is_that_of_its_formula(model_file: Path, tmp_path: Path) -> None:
    """Against DPO written down as in its paper, over whole logits and with autograd alone."""
    task = task_of(model_file, tmp_path, objective="preference", batch=3, rate=0.01)
    example = Examples(train=pairs(3))
    trainer = Trainer(load_model(model_file), task, example, tmp_path)
    for _ in range(2):
        trainer.advance()
    loss, _ = trainer._gradients([0, 1, 2])
    found = [parameter.grad.clone() for parameter in trainer._trained if parameter.grad is not None]
    trainer._optimizer.zero_grad()

    def log_p(prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits: torch.Tensor = trainer.model(pack([[*prompt, *answer]])).log_softmax(-1)
        rows = logits[len(prompt) - 1 : -1]
        return rows.gather(1, torch.tensor(answer).unsqueeze(1)).sum()

    losses = []
    for pair in example.train:
        with torch.no_grad(), without_adapters(trainer.model):
            reference = log_p(pair.prompt, pair.answer) - log_p(pair.prompt, pair.rejected)
        margin = log_p(pair.prompt, pair.answer) - log_p(pair.prompt, pair.rejected) - reference
        losses.append(-torch.nn.functional.logsigmoid(task.beta * margin))
    expected = torch.stack(losses).mean()
    torch.autograd.backward(expected)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for ours, parameter in zip(found, trainer._trained, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-5)


def test_gathered_gradients_are_those_of_one_batch(model_file: Path, tmp_path: Path) -> None:
    gathered = []
    for tokens in (16, 4096):
        trainer = Trainer(
            load_model(model_file), task_of(model_file, tmp_path, tokens=tokens), EXAMPLES, tmp_path
        )
        trainer._gradients(list(range(8)))
        gathered.append([parameter.grad for parameter in trainer._trained])
    for one, other in zip(*gathered, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("limit", [0, 4 * 64 * 60, 1 << 30])
def test_frozen_states_are_the_same_to_the_bit_in_any_order(
    limit: int, model_file: Path, tmp_path: Path
) -> None:
    sequences = [[*one.prompt, *one.answer] for one in lessons(20)]
    model = load_model(model_file)
    first = FrozenStates(model, 1, sequences, limit=limit, folder=tmp_path)
    second = FrozenStates(model, 1, sequences, limit=limit, folder=tmp_path)
    forward = {number: first.batch([number])[1] for number in range(20)}
    second.batch([7, 3, 12])
    for number in reversed(range(20)):
        assert torch.equal(second.batch([number])[1], forward[number])
    packed = pack([sequences[4]])
    torch.testing.assert_close(forward[4], model.run(model.embed(packed), packed, stop=1))
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("objective", ["supervised", "preference"])
def test_resumed_equals_uninterrupted(objective: str, model_file: Path, tmp_path: Path) -> None:
    examples = Examples(train=pairs(20)) if objective == "preference" else EXAMPLES
    task = task_of(model_file, tmp_path, objective=objective, cache=20_000, batch=3)
    whole = Trainer(load_model(model_file), task, examples, tmp_path)
    for _ in range(9):
        whole.advance()
    part = Trainer(load_model(model_file), task, examples, tmp_path)
    for step in range(9):
        part.advance()
        if step in (2, 6):
            checkpoint.save(tmp_path / "c.pt", {**part.state(), "identity": "x"})
            part = Trainer(load_model(model_file), task, examples, tmp_path)
            state = checkpoint.load(tmp_path / "c.pt", "x")
            assert state is not None
            part.restore(state)
    assert bits(part) == bits(whole)


def run(folder: Path, task: Task, *, kills: int = 0, seed: int = 0) -> tuple[bytes, int]:
    """Train in processes, killed some times at random moments; bytes of both adapters, and steps redone."""
    prepare(folder, task, EXAMPLES)
    source = random.Random(seed)
    left, told = kills, 0
    made: Path | None = None
    while made is None:
        training = Training(folder)
        deadly = source.randrange(1, 4) if left else 1 << 30
        seen = 0
        try:
            for event in training:
                told += isinstance(event, Stepped)
                seen += isinstance(event, Stepped | Saved)
                if seen >= deadly:
                    time.sleep(source.uniform(0, 0.004))  # anywhere in a step or in writing a checkpoint
                    training.process.kill()
                    left, deadly = left - 1, 1 << 30
                if isinstance(event, Finished):
                    made = Path(event.folder)
        except TrainingError as error:
            assert "SIGKILL" in str(error)
    return (made / ADAPTER).read_bytes() + (made / MIDDLE).read_bytes(), told


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_bits(model_file: Path, tmp_path: Path) -> None:
    task = task_of(model_file, tmp_path, batch=1, epochs=1, cache=20_000)
    whole, steps = run(tmp_path / "whole", task)
    killed, _ = run(tmp_path / "killed", task, kills=2)
    assert steps == 40 and killed == whole
    assert not (tmp_path / "killed" / CHECKPOINT).exists()


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bits(model_file: Path, tmp_path: Path) -> None:
    task = task_of(model_file, tmp_path, batch=1, epochs=5)
    whole, _ = run(tmp_path / "whole", task)
    assert run(tmp_path / "killed", task, kills=20, seed=3)[0] == whole


def test_asked_to_stop_it_keeps_a_checkpoint_and_goes_on(model_file: Path, tmp_path: Path) -> None:
    task = task_of(model_file, tmp_path, batch=1, epochs=20, checkpoint=1000.0)
    prepare(tmp_path / "job", task, EXAMPLES)
    training = Training(tmp_path / "job")
    last = 0
    for event in training:
        if isinstance(event, Stepped):
            last = event.step
            training.stop()
    assert training.process.returncode == STOPPED  # not of the signal
    assert 0 < last < 800
    state = checkpoint.load(
        tmp_path / "job" / CHECKPOINT, task.identity((tmp_path / "job/examples.json").read_bytes())
    )
    assert state is not None and state["step"] == last
    other = msgspec.structs.replace(task, seed=1).identity(b"")
    assert checkpoint.load(tmp_path / "job" / CHECKPOINT, other) is None


def test_a_finished_training_says_what_it_made(model_file: Path, tmp_path: Path) -> None:
    task = task_of(model_file, tmp_path, minutes=0.002, memory=2_000_000_000, prune=0.5)
    prepare(tmp_path / "job", task, EXAMPLES)
    events = list(Training(tmp_path / "job"))
    done = events[-1]
    assert isinstance(done, Finished)
    manifest = msgspec.json.decode((Path(done.folder) / "adapter.json").read_bytes(), type=Manifest)
    measured = [event for event in events if isinstance(event, Measured)]
    assert [one.when for one in measured] == ["before", "after"] and measured[0].general is not None
    assert manifest.task == task and manifest.sha256.startswith(Path(done.folder).name)
    assert manifest.after["loss"] == measured[1].loss
    assert manifest.pruned is not None
    assert manifest.pruned["bytes_after"] < manifest.pruned["bytes_before"]
    assert 1 <= manifest.steps <= 10


def in_process(folder: Path, task: Task, *stops: int) -> Path:
    """Train here, and stop and go on after these steps; the result."""
    prepare(folder, task, EXAMPLES)
    for stop in (*stops, None):
        tell = EventLog(folder / EVENTS)
        run = Run(folder, tell)

        def told_to(event: Event, run: Run = run, tell: EventLog = tell, stop: int | None = stop) -> None:
            tell(event)
            if isinstance(event, Stepped) and event.step == stop:
                run.stop(0, None)

        run.tell = told_to  # type: ignore[assignment]
        assert run() == (0 if stop is None else STOPPED)
        tell.close()
    (made,) = (folder / "out").iterdir()
    return made


def test_the_adapter_of_half_of_the_steps_lies_beside(model_file: Path, tmp_path: Path) -> None:
    """The same bits wherever the training was interrupted, and what a training of half as many steps has."""
    task = task_of(model_file, tmp_path, batch=4, epochs=1)
    found = []
    for number, stops in enumerate([(), (4,), (5,), (6,), (3, 5, 7)]):
        folder = tmp_path / str(number)
        made = in_process(folder, msgspec.structs.replace(task, output=str(folder / "out")), *stops)
        assert not list(folder.glob(f"*{MIDDLE}*")), "nothing is left of it"
        found.append([(made / name).read_bytes() for name in (ADAPTER, MIDDLE)])
        assert msgspec.json.decode((made / MANIFEST).read_bytes(), type=Manifest).middle == 5
    assert all(one == found[0] for one in found) and found[0][0] != found[0][1]
    half = Trainer(load_model(model_file), task, EXAMPLES, tmp_path)
    for _ in range(half.steps // 2):
        half.advance()
    write_adapter(half.model, tmp_path / "h.gguf", task.lora, name="test", base=sha256(model_file))
    assert (tmp_path / "h.gguf").read_bytes() == found[0][1]
    assert candidates(tmp_path) == {"end": tmp_path / ADAPTER}, "an older training has no other"
    assert list(candidates(made)) == ["half", "end"]
    assert "after" not in lineage_of(made, "half").scores and lineage_of(made, "half").options["taken"] == 5


def test_what_is_pruned_in_the_end_and_a_single_step_have_no_half(model_file: Path, tmp_path: Path) -> None:
    cases: list[dict[str, float]] = [{"prune": 0.5}, {"batch": 40}]
    for number, changes in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / MIDDLE).write_bytes(b"of another training")
        task = task_of(model_file, folder, epochs=1, **changes)
        made = in_process(folder, task)
        assert {path.name for path in made.iterdir()} == {ADAPTER, MANIFEST}


def test_failures_are_sentences(model_file: Path, tmp_path: Path) -> None:
    task = task_of(model_file, tmp_path, lora=LoRAOptions(rank=1000))
    prepare(tmp_path / "job", task, EXAMPLES)
    with pytest.raises(TrainingError, match="Rank 1000"):
        list(Training(tmp_path / "job"))


def test_a_line_that_is_not_whole_waits(tmp_path: Path) -> None:
    path = tmp_path / EVENTS
    reader = EventReader(path)
    path.write_bytes(b'{"event":"saved","step":1}\n{"event":"new"}\nx\n{"event":"fai')
    assert list(reader.new()) == [Saved(1)]
    with path.open("ab") as file:
        file.write(b'led","error":"no"}\n')
    assert list(reader.new()) == [Failed("no")]


def test_every_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    course = Course(10, 4, seed=3)
    epochs = [[number for _ in range(3) for number in course.next()] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 100, 1.0) for step in range(100)]
    assert rates[0] == 0.2 and max(rates) == 1.0 and rates[4] == 1.0
    assert all(one > other for one, other in pairwise(rates[5:]))
    assert 0.1 <= rates[-1] < 0.11
    assert rate_at(0, 1, 1.0) == 1.0


def test_asked_to_stop_it_measures_nothing_more(model_file: Path, tmp_path: Path) -> None:
    """A measurement takes minutes on a large model, and nothing is lost with it."""
    prepare(tmp_path, task_of(model_file, tmp_path, minutes=1), EXAMPLES)
    tell = EventLog(tmp_path / EVENTS)
    run = Run(tmp_path, tell)
    run.stop(0, None)
    assert run() == STOPPED
    tell.close()
    assert [one.event for one in told(tmp_path / EVENTS)] == [Stopped(0)]


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="no autogroup here")
def test_its_whole_session_steps_back() -> None:
    code = (
        "import os; from pathlib import Path; from lichen.adapters.trainer import step_back; step_back(19); "
        "print(Path('/proc/self/autogroup').read_text().split()[-1], os.nice(0), flush=True); os._exit(0)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, start_new_session=True
    )
    assert said.stdout.split() == ["19", "19"]
