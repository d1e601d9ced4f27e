"""Bodies, queries and answers of OpenAI's fine-tuning API, as types; see `responses.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from lichen.adapters.events import Event, Failed, Finished, Measured, Saved, Settled, Started, Stepped, Told
from lichen.adapters.jobs import Hyperparameters, Job, Status
from lichen.errors import RequestError, UnsupportedField

MAX_METADATA = 16

Auto = Literal["auto"]
FileId = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]
Suffix = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,63}\Z")]


class Asked(Struct, kw_only=True, forbid_unknown_fields=True):
    """Hyperparameters; "auto" lets lichen choose. minutes and rank are lichen's own."""

    n_epochs: Annotated[int, Meta(ge=1, le=50)] | Auto = "auto"
    batch_size: Annotated[int, Meta(ge=1, le=256)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Meta(gt=0, le=100)] | Auto = "auto"
    minutes: Annotated[float, Meta(gt=0, le=10_000)] | None = None
    rank: Annotated[int, Meta(ge=1, le=256)] | None = None


class AskedOfPairs(Asked, kw_only=True, forbid_unknown_fields=True):
    """Of preferences: beta is how far they may lead away from the model as it was."""

    beta: Annotated[float, Meta(gt=0, le=2)] | Auto = "auto"


class Supervised(Struct, kw_only=True, forbid_unknown_fields=True):
    """Learn to answer so."""

    hyperparameters: Asked = msgspec.field(default_factory=Asked)


class Pairs(Struct, kw_only=True, forbid_unknown_fields=True):
    """Learn which of two answers is better."""

    hyperparameters: AskedOfPairs = msgspec.field(default_factory=AskedOfPairs)


class Method(Struct, kw_only=True, forbid_unknown_fields=True):
    """How to learn."""

    type: Literal["supervised", "dpo"] = "supervised"
    supervised: Supervised | None = None
    dpo: Pairs | None = None

    def asked(self) -> Asked:
        """Its hyperparameters. Raises RequestError for those of the other method."""
        if self.type == "supervised" and self.dpo is not None:
            raise RequestError("method.dpo does not go with the type supervised.", param="method.dpo")
        if self.type == "dpo" and self.supervised is not None:
            raise RequestError("method.supervised does not go with the type dpo.", param="method.supervised")
        given = self.dpo if self.type == "dpo" else self.supervised
        if given is not None:
            return given.hyperparameters
        return AskedOfPairs() if self.type == "dpo" else Asked()


class JobBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/fine_tuning/jobs`: learn from an uploaded file; the adapter is then named MODEL:SUFFIX."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    training_file: FileId
    validation_file: FileId | None = None
    suffix: Suffix | None = None
    seed: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    method: Method | None = None
    hyperparameters: Asked | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=MAX_METADATA)] | None = None
    integrations: list[Any] | None = None

    def check(self) -> None:
        """Raise RequestError or UnsupportedField for what cannot be done."""
        if self.integrations:
            raise UnsupportedField("lichen sends nothing to others.", param="integrations")
        if self.hyperparameters is not None and self.method is not None:
            raise RequestError("Give hyperparameters within method, or without it.", param="hyperparameters")
        for name, value in (self.metadata or {}).items():
            if len(name) > 64 or len(value) > 512:
                raise RequestError(
                    "metadata may have names of 64 and values of 512 characters.", param="metadata"
                )

    @property
    def how(self) -> Method:
        """The method, in its present form."""
        if self.method is not None:
            return self.method
        return Method(supervised=Supervised(hyperparameters=self.hyperparameters or Asked()))


class JobsQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Of a listing: the newest `limit` after the one with the id `after`."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20


class JobError(Struct, kw_only=True):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class ChosenHyperparameters(Struct, kw_only=True):
    """As they were asked for."""

    n_epochs: int | Auto
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto


class JobMethod(Struct, kw_only=True):
    """How it learns."""

    type: Literal["supervised", "dpo"]


class JobProgress(Struct, kw_only=True):
    """lichen's own: how far it is. asked: what its owner wants and has not happened yet."""

    name: str
    digest: str | None
    asked: str | None


class JobObject(Struct, kw_only=True):
    """One job. fine_tuned_model: to be asked for, once it has succeeded."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    error: JobError | None
    fine_tuned_model: str | None
    hyperparameters: ChosenHyperparameters
    method: JobMethod
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Status
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    integrations: list[str]
    metadata: dict[str, str]
    lichen: JobProgress


class JobList(Struct, kw_only=True):
    """Jobs of the key that asks, the newest first."""

    object: Literal["list"]
    data: list[JobObject]
    has_more: bool


class JobEvent(Struct, kw_only=True):
    """Something that happened in a job. data: the numbers of a step or a measurement."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventList(Struct, kw_only=True):
    """Events of a job, the newest first."""

    object: Literal["list"]
    data: list[JobEvent]
    has_more: bool


class CheckpointList(Struct, kw_only=True):
    """Checkpoints that could be asked for as models: lichen keeps none, only the result."""

    object: Literal["list"]
    data: list[str]
    has_more: bool


def hyperparameters(asked: Asked) -> Hyperparameters:
    """As the job keeps them."""

    def chosen(value: Any) -> Any:
        return None if value == "auto" else value

    return Hyperparameters(
        epochs=chosen(asked.n_epochs),
        batch=chosen(asked.batch_size),
        multiplier=chosen(asked.learning_rate_multiplier),
        beta=chosen(asked.beta) if isinstance(asked, AskedOfPairs) else None,
        minutes=asked.minutes,
        rank=asked.rank,
    )


def job_object(job: Job, *, estimated_finish: float | None = None) -> JobObject:
    """A job as the API words it."""
    wanted = job.hyperparameters
    error = None
    if job.error:
        error = JobError(code="training_failed", message=job.error, param=job.param or None)
    return JobObject(
        id=job.id,
        object="fine_tuning.job",
        created_at=int(job.created),
        finished_at=None if job.finished is None else int(job.finished),
        estimated_finish=None if estimated_finish is None else int(estimated_finish),
        error=error,
        fine_tuned_model=None if job.outcome is None else f"{job.model}:{job.outcome.adapter}",
        hyperparameters=ChosenHyperparameters(
            n_epochs=wanted.epochs or "auto",
            batch_size=wanted.batch or "auto",
            learning_rate_multiplier=wanted.multiplier or "auto",
        ),
        method=JobMethod(type="dpo" if job.objective == "preference" else "supervised"),
        model=job.model,
        organization_id="lichen",
        result_files=[],
        seed=job.seed,
        status=job.status,
        trained_tokens=None if job.outcome is None else job.outcome.tokens,
        training_file=job.training,
        validation_file=job.validation or None,
        integrations=[],
        metadata=job.metadata,
        lichen=JobProgress(
            name=job.name, digest=None if job.outcome is None else job.outcome.digest, asked=job.asked
        ),
    )


def event_object(told: Told) -> JobEvent:
    """An event of a trainer as the API words it."""
    event = told.event
    level: Literal["info", "error"] = "error" if isinstance(event, Failed) else "info"
    return JobEvent(
        id=f"ftevent-{told.line:08d}",
        object="fine_tuning.job.event",
        created_at=int(told.at),
        level=level,
        message=message_of(event),
        type="metrics" if isinstance(event, Stepped | Measured) else "message",
        data=msgspec.to_builtins(event),
    )


def message_of(event: Event) -> str:
    """An event in a sentence."""
    match event:
        case Started(step=step, steps=steps):
            return (
                f"Training goes on at step {step} of {steps}."
                if step
                else f"Training of {steps} steps begins."
            )
        case Stepped(step=step, loss=loss):
            return f"Step {step}: training loss {loss:.3f}."
        case Measured(when=when, loss=loss, general=general):
            return f"Losses {when}: held-out {_number(loss)}, general {_number(general)}."
        case Saved(step=step):
            return f"A checkpoint of step {step} is kept."
        case Failed(error=error):
            return error
        case Finished(seconds=seconds):
            return f"The training has ended after {seconds:.0f} s."
        case Settled():
            return settled_words(event)
        case _:
            return "The training stopped; it can go on."


def settled_words(settled: Settled) -> str:
    """What the gate decided, in sentences."""
    words = []
    if len(settled.losses) > 1:
        half, end = (_number(settled.losses.get(checkpoint)) for checkpoint in ("half", "end"))
        when = "half of the steps" if settled.checkpoint == "half" else "all steps"
        words.append(f"The adapter after {when} is kept: held-out loss {half} after half, {end} after all.")
    words += [f"It does not serve: {fault}" for fault in settled.faults] or ["It serves now."]
    return " ".join(words)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
