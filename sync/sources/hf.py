"""`hf:org/repo/path/model.gguf[@revision]`: a file of a Hugging Face repository.

`huggingface_hub` says where the file is and what hash it must have (HF_ENDPOINT and HF_TOKEN count);
the bytes come through lichen's own resumable download.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import PurePosixPath

from lichen.errors import SourceError
from lichen.sync.sources import Origin

_SHA256 = re.compile(r"[0-9a-f]{64}")


async def locate(rest: str) -> Origin:
    """Ask the hub for one file. Raises SourceError when it is not there or not readable."""
    where, _, revision = rest.partition("@")
    parts = where.split("/")
    if len(parts) < 3 or not all(parts):
        raise SourceError(f"hf:{rest} is not complete.", hint="Write it as hf:org/repo/file.gguf")
    return await asyncio.to_thread(_locate, "/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def _locate(repo: str, file: str, revision: str | None) -> Origin:
    from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url

    try:
        url = hf_hub_url(repo, file, revision=revision, endpoint=constants.ENDPOINT)
        metadata = get_hf_file_metadata(url, timeout=30)
    except Exception as error:  # the hub's client raises those of whichever HTTP library it uses
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"The hub has no readable file {file} in {repo}: {reason}",
            hint="Check the name; for a private or gated model set HF_TOKEN.",
        ) from error
    token = get_token()
    etag = metadata.etag or ""
    return Origin(
        file_name=PurePosixPath(file).name,
        url=url,
        headers={"Authorization": f"Bearer {token}"} if token else {},
        sha256=etag if _SHA256.fullmatch(etag) else None,  # large files carry their sha256 as the etag
        size=metadata.size,
    )
