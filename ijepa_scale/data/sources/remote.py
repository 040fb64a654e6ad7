"""Files on HTTP servers and on the HuggingFace Hub, read like local ones. Failures of the network are tried again."""

import base64
import http.client
import io
import logging
import re
import ssl
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote, unquote, urlsplit

_log = logging.getLogger(__name__)
T = TypeVar("T")

_TIMEOUT_SECONDS = 60.0  # without a byte
_SKIP = 1 << 20  # bytes forward that are read and dropped rather than asked for anew
_BUFFER = 1 << 20
_LINK_SECONDS = 5.0  # for which an image of a list is tried before other hosts of the list are
_LISTED_SECONDS = 120.0  # for an image of a list to come, once its server has begun to send it
_LISTED_BYTES = 1 << 28  # of one
_OTHER_HOSTS = 3  # that are tried then


class StreamError(ValueError):
    """A stream cannot go on. One line, that says what to do."""


class DeadLinkError(Exception):
    """One file of a list cannot be had, though the network is there."""


@dataclass(frozen=True)
class Patience:
    """How long the network may fail before the run does: waits of 1, 2, 4 ... seconds, none over longest_wait."""

    seconds: float = 300.0  # since something was last read, answers that never came included
    first_wait: float = 1.0
    longest_wait: float = 64.0


def is_remote(location: str) -> bool:
    return location.startswith(("http://", "https://", "hf://"))


def shown(location: str, place: int | None = None) -> str:
    """A path or URL as it may be kept and said: less its password and its query, which may be a signature.

    config/redaction.py leaves it as it is. place: in a list, whose URLs may differ in their queries alone.
    """
    if not is_remote(location):
        return location
    query = "?[hidden]" if place is None else f"?[hidden]#{place}"
    return re.sub(r"\?[^#]+", query, re.sub("://[^/]*@", "://[hidden]@", location), count=1)


def lasting(location: str) -> str:
    """Of a shard's path or URL what stays while credentials change."""
    return re.sub("(?<=://)[^/]+@", "", location).partition("?")[0]


def hub_file(location: str) -> tuple[str, str, str] | None:
    """(id of the data set, revision, path in it) of a location on the Hub; None where it names no file there."""
    match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", location)
    match = match or re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)/()([^@]+)", location)
    return (match[1], match[2].replace("%2F", "/") or "main", match[3]) if match else None


def open_location(location: str, patience: Patience) -> BinaryIO:
    """A local file, a URL or a file of the Hub (`hub_file` says in which form), to be read and sought in."""
    if not is_remote(location):
        return open(location, "rb")
    return cast(BinaryIO, io.BufferedReader(RemoteFile(location, patience), _BUFFER))


def read_listed(url: str, urls: Sequence[str], patience: Patience) -> bytes:
    """A file of a list of URLs. DeadLinkError where it is refused, and where it fails while another host answers.

    Where none does it may be the network: then it is tried on for as long as patience lasts, and a StreamError.
    """
    for seconds in (min(_LINK_SECONDS, patience.seconds), patience.seconds):
        try:
            with open_location(url, replace(patience, seconds=seconds)) as file:
                return _whole(file, url)
        except StreamError as error:
            if _is_lasting(error.__cause__) or _another_host_answers(url, urls):
                cause = error.__cause__ or error
                raise DeadLinkError(f"{shown(url)} cannot be read: {type(cause).__name__}: {cause}") from error
            failure = error
        except ValueError as error:
            raise DeadLinkError(f"{shown(url)} is no URL: {error}") from error
    raise failure


def _whole(file: BinaryIO, url: str) -> bytes:
    """DeadLinkError for one that does not end, as a video, or a server that sends a byte now and then."""
    parts, size, until = [], 0, time.monotonic() + _LISTED_SECONDS
    while part := cast(io.BufferedReader, file).read1(_BUFFER):
        parts.append(part)
        size += len(part)
        if size > _LISTED_BYTES or time.monotonic() > until:
            raise DeadLinkError(f"{shown(url)} is no image: {size:,} bytes have come, and there is no end")
    return b"".join(parts)


def _another_host_answers(url: str, urls: Sequence[str]) -> bool:
    others = {other.split("/")[2]: other for other in urls[:: max(1, len(urls) // 1000)] if is_remote(other)}
    others.pop(url.split("/")[2], None)
    return any(_answers(other) for other in list(others.values())[:_OTHER_HOSTS])


def _answers(url: str) -> bool:
    try:
        with open_location(url, Patience(0)) as file:
            file.read(1)
    except StreamError as error:
        return _is_lasting(error.__cause__)
    return True


def _is_lasting(error: BaseException | None) -> bool:
    """Whether a server answered, and another try would change nothing."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in (408, 425, 429)
    return isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError)


def tried_again(call: Callable[[], T], what: str, patience: Patience) -> T:
    """call(), repeated with growing waits while the network fails. StreamError once patience is at its end."""
    started, wait, tries = time.monotonic(), patience.first_wait, 1
    while True:
        try:
            return call()
        except (OSError, http.client.HTTPException) as error:  # urllib's errors and timeouts are OSErrors
            reason = f"{type(error).__name__}: {error}"
            if _is_lasting(error):
                status = error.code if isinstance(error, urllib.error.HTTPError) else 0
                raise StreamError(f"{what} cannot be read: {reason}{_advice(what, status)}") from error
            if (waited := time.monotonic() - started) >= patience.seconds:
                raise StreamError(
                    f"{what} cannot be read: {reason}; gave up after {tries} tries in {waited:.0f} s: look at the "
                    "network and the server, then start the same command again; data.retry_seconds sets how long to try"
                ) from error
        _log.warning("warning: %s: %s; trying again in %g s (try %d failed)", what, reason, wait, tries)
        time.sleep(wait)
        wait, tries = min(2 * wait, patience.longest_wait), tries + 1


def _advice(location: str, status: int) -> str:
    if (found := hub_file(location)) and status in (401, 403, 404):
        return "; " + hub_access_advice(found[0])
    return "; check the URL, or take it out of the source" if 400 <= status < 500 else ""


def hub_access_advice(dataset_id: str) -> str:
    """What to do where the Hub refuses a data set or seems not to have it."""
    return (
        f"if the data set is gated, accept its terms at https://huggingface.co/datasets/{dataset_id} while logged in; "
        "if it is gated or private, give this machine a token that may read it: run `hf auth login`, or set HF_TOKEN"
    )


class RemoteFile(io.RawIOBase):
    """A file behind a URL. Reads go through one connection as long as they go forward; a broken one is made anew.

    It goes on at the byte where it broke off: by a range request or, from a server that knows none, by reading anew.
    """

    def __init__(self, location: str, patience: Patience):
        self._location, self._patience = location, patience
        self._position = 0
        self._size: int | None = None
        self._response: Any = None
        self._at = 0  # where in the file the response stands

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += self._known_size()
        elif whence == io.SEEK_CUR:
            offset += self._position
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        data = tried_again(lambda: self._read(len(buffer)), shown(self._location), self._patience)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, count: int) -> bytes:
        """Up to count bytes at the position; none at the end of the file."""
        if self._size is not None and self._position >= self._size:
            return b""
        if not 0 <= self._position - self._at <= _SKIP:
            self._drop()
        try:
            if self._response is None:
                self._connect()
            while self._response is not None and self._at < self._position:
                self._at += len(self._some(min(self._position - self._at, _BUFFER)))
            data = self._some(count) if self._response is not None else b""
        except BaseException:
            self._drop()
            raise
        self._position += len(data)
        self._at = self._position
        return data

    def _some(self, count: int) -> bytes:
        if self._size is not None:
            count = min(count, self._size - self._at)
        data = self._response.read1(count)  # what is there: a slow server is not waited for until all has come
        if not data and self._size is not None and count:
            raise ConnectionError(f"the connection ended at byte {self._at} of {self._size}")
        if not data and self._at < self._position:
            raise ConnectionError(f"the file ended at byte {self._at}, before byte {self._position}")
        return data

    def _connect(self) -> None:
        try:
            response = self._request(f"bytes={self._position}-")
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing there: this is the end
                error.close()
                self._size = self._position if self._size is None else self._size
                return
            raise
        self._response = response
        self._at = self._position if response.status == 206 else 0
        size = _full_size(response)
        if None not in (size, self._size) and size != self._size:
            raise StreamError(
                f"{shown(self._location)} has changed from {self._size} to {size} bytes while it was read; start again"
            )
        self._size = size if size is not None else self._size

    def _known_size(self) -> int:
        def ask() -> int | None:
            with self._request("bytes=0-0") as response:
                return _full_size(response)

        if self._size is None:
            self._size = tried_again(ask, shown(self._location), self._patience)
        if self._size is None:
            raise StreamError(
                f"{shown(self._location)}: the server does not say how large the file is, so it can be read from its "
                "start only, as .tar files are; use another server or a local copy"
            )
        return self._size

    def _request(self, ranges: str) -> Any:
        url, headers = _resolve(self._location)
        headers = {**headers, "Range": ranges, "Accept-Encoding": "identity", "User-Agent": "ijepa-scale"}
        timeout = min(_TIMEOUT_SECONDS, max(self._patience.seconds, _LINK_SECONDS))
        return _opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None
        self._at = -1 - _SKIP  # so that no position is near


def _full_size(response: Any) -> int | None:
    if response.status == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isdecimal() else None
    length = response.headers.get("Content-Length")
    return int(length) if length else None


def _resolve(location: str) -> tuple[str, dict[str, str]]:
    """The URL of a location, and the headers that it needs: the user's token, for the Hub."""
    if not location.startswith("hf://"):
        scheme, _, rest = location.partition("://")
        user, at, _ = rest.partition("/")[0].rpartition("@")
        url = quote(f"{scheme}://{rest.removeprefix(user + at)}", safe=string.punctuation)  # what is quoted stays so
        return url, {"Authorization": f"Basic {base64.b64encode(unquote(user).encode()).decode()}"} if at else {}
    import huggingface_hub

    found = hub_file(location)
    assert found, location
    repo, revision, path = found
    url = huggingface_hub.hf_hub_url(repo, path, repo_type="dataset", revision=revision)
    return url, {key.title(): value for key, value in huggingface_hub.utils.build_hf_headers().items()}


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        """The token goes to the Hub alone, and not to the storage that it sends on to."""
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            request.remove_header("Authorization")
        return request


_opener = urllib.request.build_opener(_Redirects)
