"""Common Crawl by name: the archives of a crawl from its own listing (https://commoncrawl.org/get-started)."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pipelines import storage
from pipelines.documents import BadRecord, InputError
from pipelines.sources import Record, Source
from pipelines.sources.compressed import Damage, pieces

_MAX_LISTING = 256 << 20  # bytes; a crawl has some 90,000 archives, each a line of 140


def list_archives(source: Source) -> list[storage.FileInfo]:
    """The archives that a source asks for, in the listing's order; their sizes are not in it and so are 0.

    With a limit, archives are taken evenly from the whole listing, whose parts differ in time and place.

    Raises:
        FileNotFoundError: there is no such crawl.
        InputError: the listing is damaged or empty.
    """
    uri = storage.join(source.base, "crawl-data", source.crawl, f"{source.archives}.paths.gz")
    listing = bytearray()
    try:
        with storage.open_input(uri) as file:
            for piece in pieces(file, lambda start: False):
                if isinstance(piece, Damage):
                    raise InputError(f"{uri}: damaged, {piece.detail}")
                listing += piece.data
                if len(listing) > _MAX_LISTING:
                    raise InputError(f"{uri}: more than {_MAX_LISTING} bytes, which no listing of a crawl has")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{uri}: there is no crawl {source.crawl} with {source.archives} archives at {source.base}"
        ) from None
    paths = [line.strip() for line in listing.decode("utf-8", "replace").splitlines() if line.strip()]
    if not paths:
        raise InputError(f"{uri}: lists no archives")
    wanted = min(source.limit or len(paths), len(paths))
    chosen = [paths[i * len(paths) // wanted] for i in range(wanted)]
    return [storage.FileInfo(storage.join(source.base, path), 0, 0.0) for path in chosen]


def read(uri: str, source: Source) -> Iterator[Record | BadRecord]:
    """An archive's pages or texts; one that the listing names but that is not there is a BadRecord."""
    from pipelines.sources import warc

    if storage.is_web(uri):
        time.sleep(source.delay)
    try:
        yield from warc.read(uri, source)
    except FileNotFoundError as error:
        yield BadRecord(uri, 0, "common-crawl: no such archive", str(error))
