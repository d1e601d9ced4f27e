"""The collector's page: one HTML document without scripts, pictures or anything from elsewhere.

Everything that came from a device, a policy or a bundle is escaped; the content policy forbids the rest.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from html import escape

from lichen.sync.collector.board import Board

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; margin: .7rem 0; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #8884; }
td { vertical-align: top; }
th { font-weight: 600; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.state { padding: 0 .5rem; border-radius: .6rem; background: #8883; }
.rolled_back, .stopped { background: #c336; } .running { background: #3a36; } .paused { background: #ca36; }
p.note { color: #777; }
"""
_Row = Sequence[str | int]


def page(fleet: str, boards: Sequence[Board], *, at: float, devices: int, waiting: int, dropped: int) -> str:
    """The document. at: seconds since 1970. devices, waiting: members, and those that nobody let in yet."""
    time = f"{datetime.datetime.fromtimestamp(at, datetime.UTC):%Y-%m-%d %H:%M} UTC"
    counts = f"{devices:,} devices" + (f", {waiting:,} wait to be let in" if waiting else "")
    lost = f" Devices had no room for {dropped:,} reports." if dropped else ""
    parts = [_section(each) for each in boards] or ["<p>No device has reported yet.</p>"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(fleet)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>Fleet {escape(fleet)}</h1><p class="note">{counts}; as of {time}.{lost}</p>'
        f"{''.join(parts)}</body></html>\n"
    )


def _section(board: Board) -> str:
    title = escape(board.slot)
    if board.state:
        words = escape(board.state.replace("_", " "))
        title += f' <span class="state {escape(board.state)}">{words}</span>'
    parts = [f"<h2>{title}</h2>"]
    if board.target:
        parts.append(f"<p>Rolls out {escape(board.target)}. {escape(board.reason)}</p>")
    if board.verdict is not None:
        parts.append(f'<p class="note">{escape(board.verdict.reason)}</p>')
    if board.waves:
        rows = [
            (
                each.number,
                each.condition,
                "open" if each.open else "closed",
                each.devices,
                states(each.states),
            )
            for each in board.waves
        ]
        parts.append(_table(("Wave", "Who", "", "Devices", "States"), rows))
    parts.append(_table(("Version", "Devices"), board.versions.items()))
    if board.failures:
        failures = [(each.target, f"{each.cause} {each.code}", each.devices) for each in board.failures]
        parts.append(_table(("Failed", "Why", "Devices"), failures))
    if board.silent:
        parts.append(f'<p class="note">{board.silent:,} devices have been silent for a week.</p>')
    return "".join(parts)


def states(counted: dict[str, int]) -> str:
    """States and how many devices are in each, in one line."""
    return ", ".join(f"{count:,} {state.replace('_', ' ')}" for state, count in counted.items())


def _table(header: Sequence[str], rows: Iterable[_Row]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: str | int) -> str:
    return f'<td class="n">{value:,}</td>' if isinstance(value, int) else f"<td>{escape(value)}</td>"
