"""A real HTTP server on loopback that answers as an OpenAI-compatible endpoint does, or as a broken one does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server sends. `stall_s` waits first; `cut` closes the connection in the middle of the body."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    stall_s: float = 0.0
    cut: bool = False


@dataclass
class Endpoint:
    """A running server: its URL, and what it was asked."""

    url: str
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def completion(text: str | None, prompt_tokens: int = 7, completion_tokens: int = 3) -> Reply:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 10}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return Reply(body=json.dumps(body).encode())


def stream(pieces: list[str], cut: bool = False) -> Reply:
    def event(choices: list[object], **extra: object) -> bytes:
        body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **extra}
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    events = [event([{"index": 0, "delta": {"content": piece}, "finish_reason": None}]) for piece in pieces]
    usage = {"prompt_tokens": 7, "completion_tokens": len(pieces), "total_tokens": 9}
    tail = [] if cut else [event([], usage=usage), b"data: [DONE]\n\n"]
    return Reply(body=b"".join(events + tail), content_type="text/event-stream", cut=cut)


@contextmanager
def endpoint(answer: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Endpoint]:
    """Serve until the block ends; `answer` gets the number of the request (from 0) and its body."""
    running = Endpoint("")
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(running.seen)
                running.seen.append(body)
                running.keys.append(self.headers.get("Authorization", ""))
            self.send(answer(number, body))

        def send(self, reply: Reply) -> None:
            time.sleep(reply.stall_s)
            length = len(reply.body) + (10 if reply.cut else 0)
            try:
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.content_type)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(reply.body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up waiting, as the test wants

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    running.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
