"""A web server on this machine that serves a folder, also as the Hub would a data set, and fails as it is told."""

import contextlib
import http.server
import json
import re
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

HUB_ID, HUB_COMMIT = "me/data", "a" * 40


class Server:
    """url: of the folder. faults: what befalls the next requests, one each: a status, or "drop" mid-body. After them
    all goes well. ranges: whether it knows range requests. requests: (path, Range header, Authorization header)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults: list[int | str] = []
        self.ranges = True
        self.requests: list[tuple[str, str | None, str | None]] = []
        self.redirect = ""  # where all requests are sent on to
        self.headers: dict[str, str] = {}  # of failures
        self.url = ""


def hub_answer(folder: Path, path: str) -> list | dict | Path:
    """What the Hub answers for the data set HUB_ID, whose files are the folder's: JSON, or a file."""
    api = f"/api/datasets/{HUB_ID}"
    if path == api or path.startswith(f"{api}/revision/"):
        return {"id": HUB_ID, "sha": HUB_COMMIT, "private": False, "gated": False, "tags": [], "siblings": []}
    if match := re.fullmatch(rf"{api}/tree/{HUB_COMMIT}/?(.*)", path):
        files = sorted((folder / match[1]).iterdir()) if (folder / match[1]).is_dir() else []
        kinds = [("directory", 0) if file.is_dir() else ("file", file.stat().st_size) for file in files]
        return [
            {"type": kind, "path": str(file.relative_to(folder)), "size": size, "oid": "b" * 40}
            for file, (kind, size) in zip(files, kinds, strict=True)
        ]
    match = re.fullmatch(rf"/datasets/{HUB_ID}/resolve/[^/]+/(.+)", path)
    return folder / (match[1] if match else path.lstrip("/"))


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            server.requests.append((self.path, wanted, self.headers.get("Authorization")))
            fault = server.faults.pop(0) if server.faults else None
            found = hub_answer(server.folder, self.path.partition("?")[0])
            if fault is None and not server.redirect and isinstance(found, Path) and not found.is_file():
                fault = 404
            if server.redirect and fault is None:
                self.send_response(302)
                self.send_header("Location", server.redirect + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if isinstance(fault, int):
                self.send_response(fault)
                for key, value in server.headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = found.read_bytes() if isinstance(found, Path) else json.dumps(found).encode()
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "") if server.ranges else None
            start = int(match[1]) if match else 0
            if start >= len(content) and match:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            end = min(int(match[2]) + 1, len(content)) if match and match[2] else len(content)
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", f'"{zlib.crc32(content)}"')
            self.send_header("X-Repo-Commit", HUB_COMMIT)
            self.end_headers()
            if self.command == "HEAD":
                return
            part = content[start:end]
            with contextlib.suppress(ConnectionError):  # the client may have what it wants
                self.wfile.write(part[: len(part) // 2] if fault == "drop" else part)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_port}"
    try:
        yield server
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
