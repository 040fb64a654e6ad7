import contextlib
import http.server
import io
import logging
import ssl
import threading
import time
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants

from ijepa_scale.data.sources import remote
from ijepa_scale.data.sources.remote import (
    DeadLinkError,
    Patience,
    StreamError,
    hub_file,
    is_remote,
    open_location,
    read_listed,
)
from tests.data.server import serving

QUICK = Patience(seconds=0.2, first_wait=0.01, longest_wait=0.04)
CONTENT = np.random.default_rng(0).integers(0, 256, 3_500_000, dtype=np.uint8).tobytes()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "x.bin").write_bytes(CONTENT)
    (tmp_path / "empty.bin").write_bytes(b"")
    with serving(tmp_path) as server:
        yield server


def test_files_of_the_hub_by_location():
    assert hub_file("hf://datasets/me/data@refs%2Fpr%2F1/a/b.tar") == ("me/data", "refs/pr/1", "a/b.tar")
    assert hub_file("hf://datasets/old@abc/b.tar") == ("old", "abc", "b.tar")
    assert hub_file("hf://datasets/me/data/a/b.tar") == ("me/data", "main", "a/b.tar")
    for other in (
        "hf://datasets/me/data",
        "hf://me/data/b.tar",
        "hf://datasets/me",
        "https://x/datasets/me/data/b.tar",
    ):
        assert hub_file(other) is None


def test_what_is_remote(tmp_path):
    assert is_remote("http://x/y") and is_remote("https://x/y") and is_remote("hf://datasets/a/b@main/c")
    assert not is_remote("/x/http://") and not is_remote("x.tar")
    (tmp_path / "a").write_bytes(b"here")
    with open_location(str(tmp_path / "a"), QUICK) as file:
        assert file.read() == b"here"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_remote_file_is_read_as_a_local_one(server, ranges):
    server.ranges = ranges
    rng = np.random.default_rng(1)
    local = io.BytesIO(CONTENT)
    with open_location(f"{server.url}/x.bin", QUICK) as file:
        for _ in range(30):
            where, count = int(rng.integers(0, len(CONTENT) + 10)), int(rng.integers(0, 200_000))
            assert file.seek(where) == local.seek(where)
            assert file.read(count) == local.read(count)
            assert file.tell() == min(where + count, len(CONTENT)) or where > len(CONTENT)
        assert file.seek(-5, io.SEEK_END) == local.seek(-5, io.SEEK_END)
        assert file.read() == CONTENT[-5:]
    with open_location(f"{server.url}/empty.bin", QUICK) as file:
        assert file.read() == b""


def test_urls_need_not_be_quoted(server):
    quoted = server.folder / "a%20%C3%A9.bin"
    quoted.write_bytes(b"there")
    for name in ("a é.bin", quoted.name):
        with open_location(f"{server.url}/{name}", QUICK) as file:
            assert file.read() == b"there"


@pytest.mark.parametrize("ranges", [True, False])
def test_failures_are_tried_again_from_where_the_connection_broke(server, ranges, caplog):
    server.ranges = ranges
    server.faults = [503, "drop", 429, 500, "drop"]
    with caplog.at_level(logging.WARNING), open_location(f"{server.url}/x.bin", QUICK) as file:
        assert file.read() == CONTENT
    assert server.faults == []
    assert len(server.requests) == 6
    starts = [int(wanted.removeprefix("bytes=").removesuffix("-")) for _, wanted, _ in server.requests]
    assert starts == sorted(starts) and starts[2] > 0 and (starts[5] > starts[2] or not ranges)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 5 and all("x.bin" in text and "trying again in 0.0" in text for text in warnings)
    assert "503" in warnings[0] and "connection ended at byte" in warnings[1] and "429" in warnings[2]


@pytest.mark.parametrize("slow, limit", [(0.02, "_LISTED_SECONDS"), (0.0, "_LISTED_BYTES")])
def test_a_listed_image_that_does_not_end_is_a_dead_link(monkeypatch, slow, limit):
    """A server that sends a byte now and then, or a video: neither ever stops."""
    monkeypatch.setattr(remote, limit, 0.3 if slow else 100_000)

    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                while True:
                    self.wfile.write(b"x" if slow else b"x" * 8192)
                    time.sleep(slow)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        url, began = f"http://127.0.0.1:{listening.server_port}/x.jpg", time.monotonic()
        with pytest.raises(DeadLinkError, match=r"x\.jpg is no image: [\d,]+ bytes have come, and there is no end"):
            read_listed(url, [url], Patience())
        assert time.monotonic() - began < 10
        listening.shutdown()


def test_waits_grow_up_to_a_limit_and_patience_ends(server, monkeypatch):
    waits = []

    def seconds():  # a try takes half of one
        return sum(waits) + len(waits) / 2

    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waits.append, monotonic=seconds))
    server.faults = [503] * 100
    with (
        pytest.raises(StreamError, match=r"x\.bin cannot be read: HTTPError.* 503.*gave up after 11 tries in 324 s"),
        open_location(f"{server.url}/x.bin", Patience()) as file,
    ):
        file.read()
    assert waits == [1, 2, 4, 8, 16, 32, 64, 64, 64, 64]
    assert len(server.requests) == 11


def test_what_waiting_cannot_mend_fails_at_once(server):
    for fault, advice in ((404, "check the URL"), (403, "")):
        server.faults = [fault]
        with (
            pytest.raises(
                StreamError, match=rf"x\.bin cannot be read: HTTPError: HTTP Error {fault}.*{advice}"
            ) as error,
            open_location(f"{server.url}/x.bin", QUICK) as file,
        ):
            file.read()
        assert "\n" not in str(error.value)
    assert len(server.requests) == 2


def test_a_bad_certificate_fails_at_once():
    calls = []

    def refused():
        calls.append(1)
        raise urllib.error.URLError(ssl.SSLCertVerificationError(1, "certificate has expired"))

    with pytest.raises(StreamError, match=r"https://x cannot be read: .*certificate has expired"):
        remote.tried_again(refused, "https://x", QUICK)
    assert len(calls) == 1


def test_a_server_that_is_not_there(server):
    with (
        pytest.raises(StreamError, match=r"Connection refused.*look at the network"),
        open_location("http://127.0.0.1:9/x.bin", QUICK) as file,
    ):
        file.read()


def test_a_file_that_changes_is_not_mixed_with_its_old_content(server):
    with open_location(f"{server.url}/x.bin", QUICK) as file:
        file.read(100)
        (server.folder / "x.bin").write_bytes(CONTENT[:-1])
        file.seek(3_000_000)
        with pytest.raises(StreamError, match="has changed from 3500000 to 3499999 bytes"):
            file.read(10)


def test_the_hub_gets_the_token_and_its_storage_does_not(server, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"hub")
    with serving(tmp_path) as storage:
        urls = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", urls)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        server.redirect = storage.url
        with open_location("hf://datasets/me/data@abc123/a/x.bin", QUICK) as file:
            assert file.read() == b"hub"
    assert server.requests == [("/datasets/me/data/resolve/abc123/a/x.bin", "bytes=0-", "Bearer hf_secret")]
    assert storage.requests == [("/datasets/me/data/resolve/abc123/a/x.bin", "bytes=0-", None)]
    server.redirect = ""
    server.faults = [403]
    with (
        pytest.raises(StreamError, match=r"terms at https://huggingface\.co/datasets/me/data .*login.*HF_TOKEN"),
        open_location("hf://datasets/me/data@abc123/a/x.bin", QUICK) as file,
    ):
        file.read()
