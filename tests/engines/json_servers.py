"""HTTP servers on loopback that a test answers for, in place of SGLang's."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

S = TypeVar("S", bound="JsonServer")


class JsonServer(ThreadingHTTPServer):
    """A subclass says in :meth:`respond` what is answered; it serves within :func:`served`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def respond(self, path: str, body: Any) -> tuple[Any, int] | None:
        """(content, status) to a request; None ends the connection without an answer."""
        raise NotImplementedError


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(json.loads(body) if body else None)

    def do_GET(self) -> None:
        self._answer(None)

    def _answer(self, body: Any) -> None:
        assert isinstance(self.server, JsonServer)
        answer = self.server.respond(self.path, body)
        if answer is None:
            self.close_connection = True
            return
        data = json.dumps(answer[0]).encode()
        self.send_response(answer[1])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(*servers: S) -> Iterator[list[S]]:
    """The servers, each answering in a thread of its own until the block ends."""
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield list(servers)
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
