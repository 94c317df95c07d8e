"""A small OpenAI-compatible server on this machine."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Gives the reply for (how often this content was asked, request body): text, or a status to fail.
Reply = str | int | bytes


class JudgeServer:
    """Answers `/v1/chat/completions` by a function; keeps all requests."""

    def __init__(self, reply) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        counts: dict[str, int] = {}
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = body["messages"][-1]["content"]
                with lock:
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    asked = counts[content] = counts.get(content, 0) + 1
                answer = reply(asked, body) if self.path == "/v1/chat/completions" else 404
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                if isinstance(answer, str):
                    choice = {"message": {"role": "assistant", "content": answer}}
                    answer = json.dumps({"choices": [choice]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Talker:
    """A port that says the same to everyone, in whatever way.

    Args:
        said: bytes, or a function that is given the connection.
    """

    def __init__(self, said: bytes | Callable[[socket.socket], object]) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.callers = 0

        def talk(caller: socket.socket) -> None:
            with caller, contextlib.suppress(OSError):  # who has heard enough hangs up
                caller.recv(65536)
                caller.sendall(said) if isinstance(said, bytes) else said(caller)

        def listen() -> None:
            while True:
                try:
                    caller, _ = self.socket.accept()
                except OSError:  # closed
                    return
                self.callers += 1
                threading.Thread(target=talk, args=(caller,), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()

    def __enter__(self) -> Talker:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
