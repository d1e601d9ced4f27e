"""Every error that lichen raises on purpose, in one tree.

    LichenError                       whose fault, HTTP status, a code, and what to do next
    ├── RequestError                  400  the caller's request is wrong; `param` names the field
    │   ├── UnsupportedField          400  a known field that lichen does not honour (never silence)
    │   ├── ContextOverflow           400  prompt longer than the context; carries both numbers
    │   ├── PayloadTooLarge           413  body over the limit
    │   ├── TemplateError             400  the model's chat template refused the messages
    │   └── LessonError               400  a file of lessons has bad lines; the message names the first
    ├── Unauthorized                  401  missing or wrong API key
    ├── Forbidden                     403  Host or Origin not allowed
    ├── NotFound                      404  no such model, route or response
    │   └── NotKept                   404  feedback on a response whose content was not kept
    ├── JournalOff                    409  feedback or files came to a daemon that keeps none
    ├── QueueFull                     429  admission queue is full; carries `retry_after` seconds
    ├── RateLimited                   429  too many requests from one client; carries `retry_after`
    ├── TimedOut                      504  no complete answer within the time that a request gets
    ├── Unavailable                   503  shutting down, loading, or the engine is gone
    ├── OutOfMemory                   507  a model does not fit beside what must stay; carries both numbers
    ├── ConfigError                   500  a flag, variable or file holds a bad value
    ├── StoreError                    500  the model store could not do it
    │   ├── SourceError               502  a remote source refused, lied or broke off
    │   ├── HashMismatch              502  bytes do not match their pin
    │   ├── DiskFull                  507  not enough free space; carries both numbers
    │   └── OfflineError              503  offline mode forbids the network
    ├── JournalError                  500  the feedback journal or the files beside it could not do it
    │   ├── JournalDamaged            500  its file is not what lichen wrote; the daemon puts it aside
    │   ├── JournalBusy               503  another process holds it, or too much waits to be written
    │   └── JournalFull               507  the disk is full or the journal's bound is reached
    ├── TrainingError                 500  an adapter cannot be trained so, or its training failed
    ├── AdapterError                  422  an adapter that breaks its format's rules or does not fit its model
    ├── RegistryError                 409  the registry of adapters cannot do that in the state it is in
    │   └── GateError                 500  an adapter cannot be measured, so it is not served
    ├── FleetError                    500  membership of a fleet, or a fleet's repository, is not in order
    │   ├── TrustError                502  metadata or bytes of the fleet do not verify
    │   ├── MetadataExpired           503  the fleet's metadata is too old; updates stop, serving does not
    │   └── ManifestError             422  what a target says of itself is malformed or too new
    ├── ModelFileError                422  a GGUF that breaks its own rules
    ├── TensorError                   422  numbers or buffers that cannot be stored in a tensor's type
    └── EngineError                   500  the native engine failed

Foreign exceptions are translated where they enter (sources, native calls, HTTP), never further up.
This module imports nothing of lichen, so that every layer may use it.
"""

from __future__ import annotations

from typing import ClassVar


class LichenError(Exception):
    """A failure that a person can act on.

    The message is one readable sentence; `hint`, where there is one, says what to do next.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    kind: ClassVar[str] = "server_error"  # OpenAI's `error.type`

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class RequestError(LichenError):
    """The request itself is wrong; `param` names the offending field where one is known."""

    status = 400
    code = "invalid_request"
    kind = "invalid_request_error"


class UnsupportedField(RequestError):
    """A field of the API that lichen knows and does not honour."""

    code = "unsupported_field"


class ContextOverflow(RequestError):
    """The prompt does not fit in the context: both numbers, in tokens."""

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, context_tokens: int, *, param: str | None = None) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens, but the context holds {context_tokens}, "
            "at least one of them for the answer.",
            hint="Shorten the prompt or start lichen with a larger --context.",
            param=param,
        )
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


class PayloadTooLarge(RequestError):
    """The HTTP body is over the configured limit."""

    status = 413
    code = "payload_too_large"


class TemplateError(RequestError):
    """The model's chat template refused the messages, or broke its time or size bound."""

    code = "template_error"


class Unauthorized(LichenError):
    """No API key, or a wrong one."""

    status = 401
    code = "invalid_api_key"
    kind = "authentication_error"


class Forbidden(LichenError):
    """Host or Origin is not one that this daemon answers to."""

    status = 403
    code = "forbidden"
    kind = "permission_error"


class NotFound(LichenError):
    """No such model, file or route."""

    status = 404
    code = "not_found"
    kind = "not_found_error"


class NotKept(NotFound):
    """Feedback on a response whose content was not kept, so that there is nothing to learn from."""

    code = "not_kept"


class JournalOff(LichenError):
    """This daemon keeps neither feedback nor files: its setting `journal` is off."""

    status = 409
    code = "journal_off"
    kind = "invalid_request_error"


class QueueFull(LichenError):
    """Too many requests wait already; try again after `retry_after` seconds."""

    status = 429
    code = "queue_full"
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, hint=f"Try again in {retry_after} s.")
        self.retry_after = retry_after


class RateLimited(LichenError):
    """One client sent too many requests; try again after `retry_after` seconds."""

    status = 429
    code = "rate_limited"
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, hint=f"Try again in {retry_after} s.")
        self.retry_after = retry_after


class TimedOut(LichenError):
    """The request was not answered in time; its generation is cancelled."""

    status = 504
    code = "timed_out"


class Unavailable(LichenError):
    """The engine is loading, stopping or gone."""

    status = 503
    code = "unavailable"


class OutOfMemory(LichenError):
    """A model needs more memory than it may take; both numbers, in bytes."""

    status = 507
    code = "out_of_memory"

    def __init__(self, what: str, needed: int, free: int) -> None:
        super().__init__(
            f"{what} needs {needed / 1e6:,.0f} MB of memory, but lichen may take only "
            f"{max(0, free) / 1e6:,.0f} MB.",
            hint="Unload a pinned model, raise --memory-limit, or take a smaller model.",
        )
        self.needed = needed
        self.free = free


class ConfigError(LichenError):
    """A setting (flag, environment variable or file) holds a value that cannot be used."""

    code = "bad_configuration"


class StoreError(LichenError):
    """The model store could not do what was asked."""

    code = "store_error"


class SourceError(StoreError):
    """A remote model source refused, lied or broke off."""

    status = 502
    code = "source_error"


class HashMismatch(StoreError):
    """Bytes do not have the pinned sha256."""

    status = 502
    code = "hash_mismatch"


class DiskFull(StoreError):
    """Not enough free space; both numbers, in bytes."""

    status = 507
    code = "disk_full"

    def __init__(self, path: str, needed: int, free: int) -> None:
        super().__init__(
            f"{path} has {free / 1e6:,.0f} MB free, but {needed / 1e6:,.0f} MB are needed.",
            hint="Free some space or set LICHEN_HOME to another disk.",
        )
        self.needed = needed
        self.free = free


class OfflineError(StoreError):
    """Offline mode is on and the network would be needed."""

    status = 503
    code = "offline"


class JournalError(LichenError):
    """The feedback journal, or the files for learning beside it, could not do what was asked."""

    code = "journal_error"


class JournalDamaged(JournalError):
    """The journal's file is not what lichen wrote."""

    code = "journal_damaged"


class JournalBusy(JournalError):
    """Another process holds the journal, or too much waits to be written; nothing was done."""

    status = 503
    code = "journal_busy"


class JournalFull(JournalError):
    """The disk is full, or the journal has reached its bound; nothing was kept."""

    status = 507
    code = "journal_full"


class LessonError(RequestError):
    """A file of lessons that cannot be learned from as it is; the message names the first bad lines."""

    code = "bad_lessons"


class TrainingError(LichenError):
    """An adapter cannot be trained like this, or its training failed; the last checkpoint is kept."""

    code = "training_failed"


class AdapterError(LichenError):
    """An adapter that breaks its format's rules, or does not fit the model that it is for; never loaded."""

    status = 422
    code = "bad_adapter"
    kind = "invalid_request_error"


class RegistryError(LichenError):
    """The registry of adapters cannot do that in the state it is in; nothing was changed."""

    status = 409
    code = "registry_conflict"
    kind = "invalid_request_error"


class GateError(TrainingError):
    """An adapter cannot be measured well enough to decide on it."""

    code = "gate_error"


class FleetError(LichenError):
    """This machine's membership of a fleet, or the publisher's repository, is not in order."""

    code = "fleet_error"


class TrustError(FleetError):
    """Metadata or bytes of the fleet do not verify; nothing of them was used."""

    status = 502
    code = "untrusted"


class MetadataExpired(FleetError):
    """The fleet's metadata has expired: nothing new is taken, what is here keeps serving."""

    status = 503
    code = "metadata_expired"


class ManifestError(FleetError):
    """What a target says of itself is malformed, of an unknown kind, or for a newer lichen."""

    status = 422
    code = "bad_manifest"


class ModelFileError(LichenError):
    """A GGUF file that breaks its own format's rules; never handed to the native loader."""

    status = 422
    code = "bad_model_file"
    kind = "invalid_request_error"


class TensorError(LichenError):
    """Numbers or buffers that do not fit a tensor's type: sizes, blocks, inf or nan, no importance."""

    status = 422
    code = "bad_tensor"
    kind = "invalid_request_error"


class EngineError(LichenError):
    """The native engine failed; the message says whether it recovered."""

    code = "engine_error"
