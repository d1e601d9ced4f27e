"""OpenAI's files API for files to learn from: `/v1/files`. A file is read piece by piece onto the disk,
checked line by line, and there once it is whole; a key sees only its own."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from lichen.adapters.files import FileStore, StoredFile, Upload
from lichen.adapters.thread import JournalThread
from lichen.errors import RequestError, UnsupportedField
from lichen.runtime.http.feedback import opened, struct_response, tainted
from lichen.runtime.http.journal_schema import FileDeleted, FileList, FilesQuery, file_object, parse_query
from lichen.runtime.http.keeping import asker
from lichen.runtime.http.limits import arriving

if TYPE_CHECKING:
    from lichen.adapters.registry import Registry

T = TypeVar("T")

CHUNK = 1 << 18  # bytes
MAX_FIELD = 1024  # bytes of a field that is not the file
MAX_PARTS = 16
NAME_LIMIT = 255  # characters
PURPOSE = "fine-tune"
PLAIN = frozenset({"binary", "8bit", "7bit"})


class FileRoutes:
    """The handlers. journal: None where this daemon keeps nothing. read_timeout: seconds, see `arriving`.
    registry: of the adapters that learn."""

    def __init__(
        self,
        store: FileStore | None,
        journal: JournalThread | None,
        read_timeout: float,
        registry: Registry | None,
    ) -> None:
        self._store = store
        self._journal = journal
        self._read_timeout = read_timeout
        self._registry = registry
        # Its own threads, so that checking a large file keeps nothing else waiting.
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="lichen-files")

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [
            web.post("/v1/files", self.create),
            web.get("/v1/files", self.listing),
            web.get("/v1/files/{id}", self.file),
            web.delete("/v1/files/{id}", self.delete),
            web.get("/v1/files/{id}/content", self.content),
        ]

    async def create(self, request: web.Request) -> web.Response:
        """Take a file; answered once it is checked and durable."""
        store = self._opened()
        if request.content_type != "multipart/form-data":
            raise RequestError("A file comes as multipart/form-data, with the fields file and purpose.")
        upload = await self._off_loop(store.begin)
        try:
            async with arriving(self._read_timeout) as more:
                name = await self._receive(request, upload, more)
            keep = functools.partial(store.keep, upload, owner=asker(), name=name)
            file = await self._off_loop(keep)
        finally:
            await asyncio.shield(self._off_loop(upload.abandon))
        return struct_response(file_object(file))

    async def listing(self, request: web.Request) -> web.Response:
        """The files of the key that asks."""
        wanted = parse_query(request.query, FilesQuery)
        files = await self._off_loop(functools.partial(self._opened().files, asker()))
        if wanted.order == "asc":
            files.reverse()
        if wanted.after is not None:
            files = files[_place(files, wanted.after) + 1 :]
        shown = [file_object(file) for file in files[: wanted.limit]]
        page = FileList(object="list", data=shown, has_more=len(files) > len(shown))
        if shown:
            page.first_id, page.last_id = shown[0].id, shown[-1].id
        return struct_response(page)

    async def file(self, request: web.Request) -> web.Response:
        """One file."""
        get = functools.partial(self._opened().get, request.match_info["id"], asker())
        file = await self._off_loop(get)
        return struct_response(file_object(file))

    async def content(self, request: web.Request) -> web.StreamResponse:
        """A file's bytes."""
        find = functools.partial(self._opened().content, request.match_info["id"], asker())
        path = await self._off_loop(find)
        headers = {
            "Content-Type": "application/jsonl",
            "Content-Disposition": "attachment",
            "X-Content-Type-Options": "nosniff",
        }
        return web.FileResponse(path, headers=headers)

    async def delete(self, request: web.Request) -> web.Response:
        """Delete a file, and taint whatever learned from it."""
        id, store = request.match_info["id"], self._opened()
        await self._off_loop(functools.partial(store.get, id, asker()))
        adapters = await opened(self._journal).do(lambda journal: journal.forget_lessons([id]))
        await self._off_loop(functools.partial(store.delete, id, asker()))
        await tainted(self._registry, adapters)
        return struct_response(
            FileDeleted(id=id, object="file", deleted=True, tainted_adapters=list(adapters))
        )

    async def _receive(self, request: web.Request, upload: Upload, more: Callable[[int], None]) -> str:
        """Read the form into `upload`; the file's name. Raises RequestError naming the field."""
        name: str | None = None
        purpose: str | None = None
        try:
            async for field, part in _parts(request):
                if field == "file" and name is None:
                    name = _name_of(part)
                    while chunk := await part.read_chunk(CHUNK):
                        more(len(chunk))
                        await self._off_loop(functools.partial(upload.write, bytes(chunk)))
                elif field == "purpose" and purpose is None:
                    purpose = await _text(part)
                elif field in ("file", "purpose"):
                    raise RequestError(f"The field {field} is given twice.", param=field)
                else:
                    raise UnsupportedField(f"lichen does not know the field {field!r}.", param=field)
        except (
            ValueError,
            AssertionError,
            LookupError,
            HttpProcessingError,
        ) as error:
            raise RequestError("The form is not what multipart/form-data should be.") from error
        if name is None:
            raise RequestError("The field file is required.", param="file")
        if purpose != PURPOSE:
            raise RequestError(f"purpose must be {PURPOSE!r}: files are for learning.", param="purpose")
        return name

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    def _opened(self) -> FileStore:
        opened(self._journal)
        assert self._store is not None, "a daemon with a journal has a place for files"
        return self._store


async def _parts(request: web.Request) -> AsyncIterator[tuple[str, BodyPartReader]]:
    """The fields of a form, in their order. Raises RequestError, and ValueError for what is no form."""
    form = await request.multipart()
    for _ in range(MAX_PARTS + 1):
        part = await form.next()
        if part is None:
            return
        if isinstance(part, MultipartReader) or not part.name:
            raise RequestError("Every part of the form must be a field with a name.")
        if part.headers.get("Content-Transfer-Encoding", "binary").lower() not in PLAIN:
            raise RequestError("The form must not be encoded; send its bytes as they are.")
        yield part.name, part
    raise RequestError(f"The form has more than {MAX_PARTS} parts.")


async def _text(part: BodyPartReader) -> str:
    data = await part.read_chunk(MAX_FIELD)
    if len(data) >= MAX_FIELD:
        raise RequestError(f"The field {part.name} is too long.", param=part.name)
    return bytes(data).decode("utf-8", "replace")


def _name_of(part: BodyPartReader) -> str:
    """The file's name as its sender has it, for people only: it never becomes a path."""
    name = (part.filename or "").replace("\\", "/").rpartition("/")[2]
    clean = "".join(character for character in name if character.isprintable())
    return clean[-NAME_LIMIT:] or "file.jsonl"


def _place(files: list[StoredFile], id: str) -> int:
    for place, file in enumerate(files):
        if file.id == id:
            return place
    raise RequestError(f"There is no file {id!r} to list after.", param="after")
