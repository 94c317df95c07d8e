"""A small OpenAI-compatible server on this machine."""

from __future__ import annotations

import json
import threading
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
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
