"""A web server of files on this machine, with ranges, which breaks in whatever way it is asked to."""

import os
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


def put_anew(path, data):
    """Writes a file whose time is later than that of the one before, however coarse the file system's clock is."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_bytes(data)
    at = max(path.stat().st_mtime_ns, before + 10**9)
    os.utime(path, ns=(at, at))


class Server(ThreadingHTTPServer):
    """Of this machine, for many at once."""

    daemon_threads = True
    request_queue_size = 128  # who finds no place in it is let in a second later, at the earliest


class FileServer:
    """Serves the files below a folder; a context manager.

    Attributes:
        url: of the folder. asked: how often each path was. ranges: whether parts can be asked for. etags: whether
            versions are told. latency: seconds before every answer. fails: path -> list of what happens to its next
            requests: a status, "cut" (half of what was promised), "hang" (no answer, until the server is stopped),
            "wrong" (bytes of another range).
        password: of user `me`, if one is asked for. logins: all that came.
    """

    def __init__(self, folder):
        self.folder, self.asked, self.bytes_sent = Path(folder), Counter(), 0
        self.ranges = self.etags = True
        self.latency, self.password = 0.0, None
        self.logins = set()
        self.fails = {}
        self._counting, self._stopped = threading.Lock(), threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def log_message(self, *args):
                pass

            def do_GET(self):
                owner.answer(self)

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self.stop()

    def stop(self):
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request):
        path = unquote(request.path.partition("?")[0].lstrip("/"))
        with self._counting:
            self.asked[path] += 1
            self.logins |= {request.headers["Authorization"]} - {None}
            failing = self.fails.get(path) or self.fails.get("*")
            what = failing.pop(0) if failing else None
        time.sleep(self.latency)
        if what == "hang":
            self._stopped.wait()
            return
        if isinstance(what, int):
            request.send_error(what)
            return
        if self.password is not None and request.headers.get("Authorization") != f"Basic {self.password}":
            request.send_error(401)
            return
        file = self.folder / path
        if not file.is_file():
            request.send_error(404)
            return
        data = file.read_bytes()
        start, stop = 0, len(data)
        wanted = request.headers.get("Range")
        if wanted and self.ranges and not data:
            request.send_response(416)
            request.send_header("Content-Range", "bytes */0")
            request.end_headers()
            return
        if wanted and self.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            request.send_response(206)
            shown = start + 1 if what == "wrong" else start
            request.send_header("Content-Range", f"bytes {shown}-{stop - 1}/{len(data)}")
        else:
            request.send_response(200)
        piece = data[start:stop]
        request.send_header("Content-Length", str(len(piece)))
        if self.etags:
            request.send_header("ETag", f'"{file.stat().st_mtime_ns}-{len(data)}"')
        request.end_headers()
        with self._counting:
            self.bytes_sent += len(piece)
        request.wfile.write(piece[: len(piece) // 2] if what == "cut" else piece)
