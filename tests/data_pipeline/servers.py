"""Servers of a folder for tests: HTTP that fails as it is told, and S3 as moto has it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3
import pytest
from moto.server import ThreadedMotoServer

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"

Fault = str | None
Choose = Callable[[int, str], Fault]  # number of the request from 0 on, and the name asked for -> what goes wrong


class FolderServer:
    """Serves `folder` at `url`.

    Faults: "STATUS" such as "500"; "page": 200 with HTML; "truncate": half of what was announced; "short": half of
    the file, announced as such; "flip": one byte changed; "stall": nothing more comes after half; "endless": bytes
    without end; "trickle": ten bytes a second; "drip": the response's header at ten bytes a second, without end;
    "redirect URL".

    Attributes:
        requests: names asked for, in order.
        choose: may be set at any time.
    """

    def __init__(self, folder: Path, choose: Choose = lambda number, name: None) -> None:
        self.folder, self.choose = folder, choose
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self._lock, self._ended = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has been killed
                    super().handle()

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/data"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = unquote(handler.path).removeprefix("/data/")
        with self._lock:
            fault = self.choose(len(self.requests), name)
            self.requests.append(name)
            self.faults.append(fault)
        path = self.folder / name
        with suppress(BrokenPipeError, ConnectionResetError):
            self._send(handler, path.read_bytes() if path.is_file() else None, fault)

    def _send(self, handler: BaseHTTPRequestHandler, data: bytes | None, fault: Fault) -> None:
        status, announced = 200, None
        if data is None:
            status, data = 404, PAGE
        elif fault is not None and fault.isdigit():
            status, data = int(fault), PAGE
        elif fault == "page":
            data = PAGE
        elif fault == "short":
            data = data[: len(data) // 2]
        elif fault == "flip":
            at = len(data) // 2
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        elif fault in ("truncate", "stall"):
            announced, data = len(data), data[: len(data) // 2]
        elif fault is not None and fault.startswith("redirect "):
            handler.send_response(302)
            handler.send_header("Location", fault.removeprefix("redirect "))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault == "drip":
            handler.close_connection = True
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not self._ended.wait(0.1):
                handler.wfile.write(b"X: x\r\n")
        handler.send_response(status)
        if fault in ("endless", "trickle"):
            handler.send_header("Connection", "close")
            handler.end_headers()
            handler.close_connection = True
            while not self._ended.wait(0.1 if fault == "trickle" else 0):
                handler.wfile.write(b"x" if fault == "trickle" else bytes(2**16))
            return
        handler.send_header("Content-Length", str(announced or len(data)))
        handler.end_headers()
        handler.wfile.write(data)
        if fault == "stall":
            self._ended.wait(60)
        if fault in ("truncate", "stall"):
            handler.close_connection = True


@contextmanager
def served(folder: Path, choose: Choose = lambda number, name: None) -> Iterator[FolderServer]:
    server = FolderServer(folder, choose)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The files below `folder` in an S3 bucket; yields its URL. The environment says where and with which keys."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "sesame",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        client: Any = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for path in folder.rglob("*"):
            if path.is_file():
                client.put_object(Bucket="shards", Key=f"a/{path.relative_to(folder)}", Body=path.read_bytes())
        yield "s3://shards/a"
    finally:
        server.stop()
