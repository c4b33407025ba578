"""A real HTTP server of a folder, which fails, stops, lies and goes away."""

import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from helpers import free_port


class Server:
    """A server of a folder, on a port of its own, that misbehaves when told to."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.requests = Counter()
        self.connections = set()
        self.number = 0
        self.every = 0  # each so-manyth request fails, in turns in one of three ways
        self.lie = False
        self.parts = True  # answers requests for parts of files
        self.slow = 0.0  # seconds a piece
        self.refusals = 0  # the next so many requests are refused ...
        self.refusal = (429, {})  # ... with this status, and these headers
        self.refused = ("HEAD", "GET")  # of these methods
        self.up()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def up(self):
        server = self

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def __init__(self, *args):
                super().__init__(*args, directory=str(server.folder))

            def log_message(self, *_):
                pass

            def setup(self):
                super().setup()
                server.connections.add(self.connection)

            def finish(self):
                server.connections.discard(self.connection)
                with suppress(OSError, ValueError):
                    super().finish()

            def hang_up(self):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def refuse(self, status, headers, body):
                text = b"not now" * 100_000  # more than arrives at once
                self.send_response_only(status)
                usual = {"Date": self.date_time_string(), "Content-Length": str(len(text))}
                for name, value in {**usual, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(text)

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                server.requests[self.path.lstrip("/")] += 1
                self.answer(body=True)

            def answer(self, body):
                server.number += 1
                fails = server.every and server.number % server.every == 0
                way = server.number // max(1, server.every) % 3 if fails else None
                path = server.folder / unquote(self.path).lstrip("/")
                if server.refusals > 0 and self.command in server.refused:
                    server.refusals -= 1
                    return self.refuse(*server.refusal, body)
                if not path.exists():
                    return self.send_error(404)
                if way == 0:
                    return self.send_error(503)
                if way == 1:
                    return self.hang_up()
                if path.is_dir():
                    return super().do_GET()
                data = path.read_bytes()
                if server.lie:
                    data = bytes([data[0] ^ 1]) + data[1:]
                if not server.parts:
                    del self.headers["Range"]
                start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0] or 0)
                end = self.headers.get("Range", "bytes=0-").split("-")[1]
                part = data[start : int(end) + 1 if end else None]
                self.send_response(206 if "Range" in self.headers else 200)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Accept-Ranges", "bytes")
                if "Range" in self.headers:
                    self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
                self.end_headers()
                if not body:
                    return None
                if way == 2:  # a body that breaks off
                    self.wfile.write(part[: len(part) // 2])
                    return self.hang_up()
                for i in range(0, len(part), 100_000):
                    time.sleep(server.slow)
                    self.wfile.write(part[i : i + 100_000])
                return None

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass

        self.server = Quiet(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def down(self):
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):  # that are kept for more
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(folder):
    server = Server(folder)
    try:
        yield server
    finally:
        server.down()
