"""Log lines as text or JSON, each with the request that it belongs to."""

from __future__ import annotations

import datetime
import json
import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

NO_KEY = "-"
NO_ADAPTER = "-"
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(slots=True)
class Exchange:
    """One request and its answer: what the log says of it. started: on the monotonic clock, seconds."""

    id: str
    key: str = NO_KEY  # id of the API key that was used
    adapter: str = NO_ADAPTER  # digest*scale of what it was answered with
    keeps: bool = False  # whether that key has its answers kept
    started: float = field(default_factory=time.monotonic)
    response: Any = None  # the aiohttp answer, once its first byte may be on the wire


# aiohttp handles each request in a task of its own, so this is never another request's.
EXCHANGE: ContextVar[Exchange | None] = ContextVar("lichen_exchange", default=None)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, and a logger's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        exchange = EXCHANGE.get()
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": None if exchange is None else exchange.id,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def configure_logging(level: str, form: Literal["text", "json"]) -> None:
    """Send log lines of at least this level to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
