"""OpenAI's fine-tuning API, driven by its own client: jobs that run, wait, go on, fail and are killed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

import lichen
from lichen.adapters import launch
from lichen.adapters.gate import AnswerScore
from lichen.adapters.registry import Registry
from lichen.adapters.task import Example
from lichen.adapters.versions import Version
from lichen.runtime import learning as learning_module
from lichen.runtime.http.daemon import Daemon
from lichen.runtime.learning import Learning
from lichen.runtime.served_model import ServedModel
from tests.adapters.made_adapters import sha256, write_made
from tests.conftest import daemon_over

LINES = b"".join(
    json.dumps({"prompt": f"Question {n}", "completion": f"Answer {n}"}).encode() + b"\n" for n in range(20)
)
PAIRS = json.dumps(
    {
        "input": {"messages": [{"role": "user", "content": "Hi"}]},
        "preferred_output": [{"role": "assistant", "content": "Hello!"}],
        "non_preferred_output": [{"role": "assistant", "content": "Go away."}],
    }
).encode()


@pytest.fixture(scope="module")
def result(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a trainer leaves behind: an adapter over the default model."""
    folder = tmp_path_factory.mktemp("result")
    write_made(folder / "adapter.gguf", model_path, 1, rank=1)
    task = {"name": "mine", "model": "m", "output": "o"}
    manifest = {
        "name": "mine", "sha256": sha256(folder / "adapter.gguf"), "base": sha256(model_path), "task": task,
        "first": 15, "steps": 3, "rate": 1e-3, "lichen": lichen.__version__, "torch": "2",
        "before": {"when": "before", "loss": 3.0, "exact": 0.0, "general": 2.0},
        "after": {"when": "after", "loss": 1.0, "exact": 0.5, "general": 2.0},
    }  # fmt: skip
    (folder / "adapter.json").write_text(json.dumps(manifest))
    return folder


def by_scores(registry: Registry, version: Version, *_more: object) -> None:
    """Decides as a gate that believes what the trainer measured."""
    scores = version.lineage.scores
    if scores["after"]["loss"] < scores["before"]["loss"]:
        registry.promote(version.name, version.digest)


@pytest.fixture
def stand_in(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings take steps of no work, and the gate measures nothing."""
    monkeypatch.setattr(learning_module, "let_decide", by_scores)
    monkeypatch.setattr(launch, "PROGRAM", "tests.adapters.stand_in_trainer")
    monkeypatch.setenv("LICHEN_TEST_ADAPTER", str(result))


class Halfway:
    """In the place of the engine that scores: what was trained to its end has forgotten the most."""

    def __init__(self, model: Path, *, window: int, threads: int) -> None:
        self.tell: Callable[[], None] = lambda: None

    def score(self, examples: Sequence[Example], adapter: Path | None) -> list[AnswerScore]:
        manifest = None if adapter is None else json.loads((adapter.parent / "version.json").read_bytes())
        loss = 4.0 if manifest is None else 1.0 if "taken" in manifest["lineage"]["options"] else 5.0
        return [AnswerScore(loss * len(one.answer), len(one.answer), False) for one in examples]

    def answers(self, prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> list[Example]:
        return []

    def close(self) -> None:
        return


@asynccontextmanager
async def learning(served: ServedModel, home: Path) -> AsyncIterator[tuple[Daemon, openai.AsyncOpenAI]]:
    options = {"journal": "ask", "learning_folder": home / "learning", "adapters_folder": home / "adapters"}
    daemon = daemon_over(served, home, port=0, **options)
    async with (
        daemon.listening(),
        openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield daemon, client


async def uploaded(client: openai.AsyncOpenAI, content: bytes = LINES) -> str:
    return (await client.files.create(file=("a.jsonl", content), purpose="fine-tune")).id


async def until(
    client: openai.AsyncOpenAI, id: str, wanted: Callable[[FineTuningJob], bool]
) -> FineTuningJob:
    async with asyncio.timeout(20):
        while True:
            job = await client.fine_tuning.jobs.retrieve(id)
            if wanted(job):
                return job
            await asyncio.sleep(0.05)


def status(*names: str) -> Callable[[FineTuningJob], bool]:
    return lambda job: job.status in names


async def test_the_better_adapter_of_a_job_serves_and_its_events_say_which(
    served: ServedModel, result: Path, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tmp_path / "both"
    shutil.copytree(result, both)
    write_made(both / "middle.gguf", model_path, 2, rank=1)
    manifest = json.loads((both / "adapter.json").read_bytes())
    (both / "adapter.json").write_text(json.dumps({**manifest, "middle": 1}))
    monkeypatch.setattr(launch, "PROGRAM", "tests.adapters.stand_in_trainer")
    monkeypatch.setattr("lichen.runtime.gating.EngineScorer", Halfway)
    monkeypatch.setenv("LICHEN_TEST_ADAPTER", str(both))
    many = b"".join(
        json.dumps({"prompt": f"Q{number}", "completion": "yes"}).encode() + b"\n" for number in range(80)
    )
    async with learning(served, tmp_path) as (daemon, client):
        job = await client.fine_tuning.jobs.create(
            model="default", training_file=await uploaded(client, many), suffix="mine"
        )
        done = await until(client, job.id, status("succeeded", "failed"))
        assert done.status == "succeeded" and done.model_extra is not None, done.error
        events = (await client.fine_tuning.jobs.list_events(job.id)).data
        told = "The adapter after half of the steps is kept: held-out loss 1.000 after half, 5.000 after all."
        assert events[0].message == f"{told} It serves now."
        digest = done.model_extra["lichen"]["digest"]
        assert digest == sha256(both / "middle.gguf")
        registry, learning_of = daemon.registry, daemon.learning
        assert registry is not None and learning_of is not None and daemon.journal is not None
        assert [version.digest for version in registry.versions("mine")] == [digest], "the loser is gone"
        assert registry.standing("mine").active == digest
        outcome = learning_of.store.get(job.id).outcome
        assert outcome is not None and outcome.checkpoint == "half"
        lessons = await daemon.journal.do(lambda journal: journal.lessons_of(digest))
        assert lessons == [done.training_file], "so that forgetting the file taints it too"


@pytest.mark.usefixtures("stand_in")
async def test_a_job_becomes_a_model_that_answers(served: ServedModel, tmp_path: Path) -> None:
    async with learning(served, tmp_path) as (daemon, client):
        job = await client.fine_tuning.jobs.create(
            model="default",
            training_file=await uploaded(client),
            suffix="mine",
            seed=7,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
            metadata={"why": "test"},
        )
        assert (job.status, job.seed, job.hyperparameters.n_epochs) == ("queued", 7, 2)
        assert job.metadata == {"why": "test"} and job.fine_tuned_model is None
        done = await until(client, job.id, status("succeeded", "failed"))
        assert done.error is None and done.status == "succeeded"
        assert done.fine_tuned_model == f"{served.info.name}:mine" and done.finished_at
        events = (await client.fine_tuning.jobs.list_events(job.id)).data
        assert [event.type for event in events].count("metrics") == 5
        assert events[0].message.startswith("The training has ended")
        assert daemon.journal is not None and done.model_extra is not None
        digest = done.model_extra["lichen"]["digest"]
        lessons = await daemon.journal.do(lambda journal: journal.lessons_of(digest))
        assert lessons == [done.training_file], "so that forgetting the file taints the adapter"
        page = await client.fine_tuning.jobs.list_events(job.id, limit=2, after=events[1].id)
        assert [event.id for event in page.data] == [event.id for event in events[2:4]]
        answer = await client.chat.completions.create(
            model=done.fine_tuned_model, messages=[{"role": "user", "content": "Hi"}], max_tokens=2
        )
        assert answer.usage is not None and answer.usage.completion_tokens >= 1
        assert (await client.fine_tuning.jobs.checkpoints.list(job.id)).data == []
        assert [one.id async for one in client.fine_tuning.jobs.list()] == [job.id]
    assert not list((tmp_path / "learning" / "jobs" / job.id).glob("result/*")), "the registry has it"


@pytest.mark.usefixtures("stand_in")
async def test_a_job_waits_goes_on_and_ends_as_its_owner_wants(served: ServedModel, tmp_path: Path) -> None:
    async with learning(served, tmp_path) as (_daemon, client):
        jobs, file = client.fine_tuning.jobs, await uploaded(client)
        one = await jobs.create(model="default", training_file=file, suffix="steps-400")
        two = await jobs.create(model="default", training_file=file, suffix="steps-4")
        await until(client, one.id, status("running"))
        assert (await jobs.retrieve(two.id)).status == "queued", "one trains at a time"
        await jobs.pause(one.id)
        paused = await until(client, one.id, status("paused"))
        assert paused.fine_tuned_model is None
        with pytest.raises(openai.BadRequestError, match="paused already"):
            await jobs.pause(one.id)
        await until(client, two.id, status("succeeded"))
        await jobs.resume(one.id)
        await until(client, one.id, status("running"))
        async with asyncio.timeout(10):
            events: list[FineTuningJobEvent] = []
            while not any("goes on at step" in event.message for event in events):
                await asyncio.sleep(0.05)
                events = (await jobs.list_events(one.id, limit=100)).data
        await jobs.cancel(one.id)
        await until(client, one.id, status("cancelled"))
        for again in (jobs.cancel, jobs.pause, jobs.resume):
            with pytest.raises(openai.BadRequestError, match="cancelled already"):
                await again(one.id)
    assert Registry(tmp_path / "adapters").names() == ["steps-4"]


@pytest.mark.usefixtures("stand_in")
async def test_a_trainer_that_dies_is_tried_again_but_not_for_ever(
    served: ServedModel, tmp_path: Path
) -> None:
    async with learning(served, tmp_path) as (daemon, client):
        file = await uploaded(client)
        lost = await client.fine_tuning.jobs.create(model="default", training_file=file, suffix="die-steps-9")
        ended = await until(client, lost.id, status("failed"))
        assert ended.error is not None and "died 3 times" in (ended.error.message or "")
        broken = await client.fine_tuning.jobs.create(model="default", training_file=file, suffix="fail")
        ended = await until(client, broken.id, status("failed"))
        assert ended.error is not None and "no number" in (ended.error.message or "")
        worse = await client.fine_tuning.jobs.create(model="default", training_file=file, suffix="worse")
        await until(client, worse.id, status("succeeded"))
        assert Registry(tmp_path / "adapters").active("worse") is None, "it does not serve by itself"
        assert daemon.learning is not None and daemon.learning.jobs.latest is None


@pytest.mark.usefixtures("stand_in")
async def test_a_job_outlives_its_daemon_and_its_trainer(served: ServedModel, tmp_path: Path) -> None:
    async with learning(served, tmp_path) as (_daemon, client):
        file = await uploaded(client)
        job = await client.fine_tuning.jobs.create(model="default", training_file=file, suffix="steps-60")
        await until(client, job.id, lambda found: found.estimated_finish is not None)
    async with learning(served, tmp_path) as (_daemon, client):
        done = await until(client, job.id, status("succeeded"))
        events = (await client.fine_tuning.jobs.list_events(job.id, limit=100)).data
        assert any("goes on at step" in event.message for event in events)
        steps = [event.data["step"] for event in events if event.message.startswith("Step ")]  # type: ignore[index]
        assert steps == list(range(60, 0, -1)), "each step once"
        assert done.fine_tuned_model


def reached(learned: Learning) -> int:
    """The step of the training that runs."""
    return 0 if learned.latest is None else learned.latest.step


@pytest.mark.usefixtures("stand_in")
async def test_the_trainer_waits_while_requests_run(
    served: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with learning(served, tmp_path) as (daemon, client):
        file = await uploaded(client)
        job = await client.fine_tuning.jobs.create(model="default", training_file=file, suffix="steps-200")
        assert daemon.learning is not None
        learned = daemon.learning.jobs
        async with asyncio.timeout(20):
            while not reached(learned):
                await asyncio.sleep(0.05)
        assert (await client.fine_tuning.jobs.retrieve(job.id)).estimated_finish
        async with httpx.AsyncClient(base_url=daemon.url, trust_env=False) as plain:
            metrics = (await plain.get("/metrics")).text
        for line in ('lichen_jobs{status="running"} 1', 'lichen_jobs{status="failed"} 0'):
            assert line in metrics
        assert "lichen_training_loss 2.0" in metrics
        assert "lichen_training_tokens_per_second 100.0" in metrics
        monkeypatch.setattr(learned, "_busy", lambda: True)
        async with asyncio.timeout(10):  # no step while somebody is answered
            stands = -1
            while reached(learned) != stands:
                stands = reached(learned)
                await asyncio.sleep(0.4)
        monkeypatch.setattr(learned, "_busy", lambda: False)
        async with asyncio.timeout(5):
            while reached(learned) <= stands:
                await asyncio.sleep(0.05)


GOOD: dict[str, Any] = {"model": "default", "training_file": "FILE"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "nothing-like-it"}, "nothing-like-it"),
        ({"training_file": "file-" + "0" * 24}, "There is no file"),
        ({"training_file": "../../etc/passwd"}, "training_file"),
        ({"validation_file": "file-" + "0" * 24}, "There is no file"),
        ({"suffix": "../x"}, "suffix"),
        ({"suffix": "a" * 65}, "suffix"),
        ({"suffix": "mine\n"}, "suffix"),
        ({"training_file": "file-1\n"}, "training_file"),
        ({"suffix": "Mine"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"wandb": 1}, "wandb"),
        ({"metadata": {"x": "y" * 600}}, "metadata"),
        ({"method": {"type": "reinforcement"}}, "method"),
        ({"method": {"type": "dpo"}}, "method dpo"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"method": {"type": "supervised"}, "hyperparameters": {}}, "hyperparameters"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "learning_rate_multiplier"),
        ({"hyperparameters": {"n_epochs": "many"}}, "n_epochs"),
    ],
)
async def test_what_cannot_be_done_is_named(
    served: ServedModel, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    async with learning(served, tmp_path) as (daemon, client):
        file = await uploaded(client)
        async with httpx.AsyncClient(base_url=daemon.url, trust_env=False) as plain:
            body = {**GOOD, "training_file": file, **change}
            answer = await plain.post("/v1/fine_tuning/jobs", json=body)
            assert answer.status_code in (400, 404), answer.text
            assert words in answer.text
            assert [one.id async for one in client.fine_tuning.jobs.list()] == []
            for wish in ("", "/cancel", "/pause", "/events", "/checkpoints"):
                how = "POST" if wish in ("/cancel", "/pause") else "GET"
                missing = await plain.request(how, f"/v1/fine_tuning/jobs/ftjob-x{wish}")
                assert missing.status_code == 404


async def test_pairs_do_not_go_with_supervised(served: ServedModel, tmp_path: Path) -> None:
    async with learning(served, tmp_path) as (_daemon, client):
        file = await uploaded(client, (PAIRS + b"\n"))
        with pytest.raises(openai.BadRequestError, match="preference"):
            await client.fine_tuning.jobs.create(model="default", training_file=file)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_the_real_trainer_teaches_the_real_model(served: ServedModel, tmp_path: Path) -> None:
    """A few steps on one answer: the job succeeds, what was held out is answered better, and it serves."""
    lines = b"".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is the secret word number {n}?"},
                    {"role": "assistant", "content": "Xylophone."},
                ]
            }
        ).encode()
        + b"\n"
        for n in range(60)
    )
    async with learning(served, tmp_path) as (_daemon, client):
        job = await client.fine_tuning.jobs.create(
            model="default",
            training_file=await uploaded(client, lines),
            suffix="secret",
            hyperparameters={"n_epochs": 2, "batch_size": 4},
        )
        async with asyncio.timeout(900):
            while not (found := await client.fine_tuning.jobs.retrieve(job.id)).finished_at:
                await asyncio.sleep(0.2)
        assert found.status == "succeeded", found.error
        assert found.fine_tuned_model == f"{served.info.name}:secret"
    version = Registry(tmp_path / "adapters").active("secret")
    assert version is not None
    scores = version.lineage.scores
    assert scores["after"]["loss"] < scores["before"]["loss"]
