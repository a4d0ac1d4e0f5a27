"""Servers on loopback for tests: moto's S3, a folder over HTTP, and a proxy that misbehaves.

The proxy passes requests on to a server and spoils some of the answers, as often as it is told:

    503       says so without asking the server      stall     says nothing for `STALLED` seconds
    403       S3's AccessDenied                      reset     the connection breaks
    truncate  half of the body, then the end         flip      one bit of the body is another
    lost      the server does it, the answer is lost
    ignore    the server is not told of If-None-Match, as one that does not know it
"""

import contextlib
import http.client
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

STALLED = 3.0
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Proxy(ThreadingHTTPServer):
    """In front of the server at `port`; `spoil` says what goes wrong from now on."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), Spoiler)
        self.behind, self.rules, self.asked = port, [], []
        self.fired = Counter()
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def spoil(self, kind, pattern, times=10**9, each=10**9):
        """The next `times` requests whose 'METHOD /path' has `pattern` in it go wrong, `each` of
        them so many times."""
        self.rules.append([kind, re.compile(pattern), times, each, Counter()])

    def quiet(self):
        """Nothing goes wrong any more; what did, by kind."""
        fired, self.rules, self.fired, self.asked = self.fired, [], Counter(), []
        return fired

    def fault(self, request):
        with self.lock:
            self.asked.append(request)
            for rule in self.rules:
                kind, pattern, times, each, seen = rule
                if times > 0 and pattern.search(request) and seen[request] < each:
                    rule[2] -= 1
                    seen[request] += 1
                    self.fired[kind] += 1
                    return kind
        return None

    def handle_error(self, request, client_address):
        """Clients go away: that is what is tested."""


class Spoiler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two sends

    def handle_any(self):
        kind = self.server.fault(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if kind == "stall":
            time.sleep(STALLED)
        if kind in ("stall", "reset"):
            return self.break_off()
        if kind in ("503", "403"):
            said = DENIED if kind == "403" else b"busy"
            return self.answer(int(kind), [], said, said)
        server = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=30)
        if kind == "ignore":
            del self.headers["If-None-Match"]
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        data = answer.read()
        server.close()
        if kind == "lost":
            return self.break_off()
        sent = data
        if kind == "flip" and data:
            at = len(data) // 2
            sent = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if kind == "truncate":
            sent = data[: len(data) // 2]
        return self.answer(answer.status, answer.getheaders(), data, sent)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

    def answer(self, status, headers, body, sent):
        self.send_response(status)
        dropped = ("connection", "transfer-encoding", "content-length", "server", "date")
        for name, value in headers:
            if name.lower() not in dropped:
                self.send_header(name, value)
        length = dict(headers).get("Content-Length") if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if len(sent) != len(body):
            self.close_connection = True

    def break_off(self):
        """RST instead of an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *args):
        pass


class Folder(SimpleHTTPRequestHandler):
    """Files of a folder, and byte ranges of them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two sends

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                data = file.read()
        except OSError:
            return self.send_error(404)
        if asked and self.server.ranges:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            if first >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def folder_server(folder, ranges=True):
    """A web server of the files below `folder`; its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Folder, directory=str(folder)))
    server.daemon_threads, server.ranges = True, ranges
    with serving(server):
        yield server.server_address[1]


@contextlib.contextmanager
def moto_server():
    """moto's S3 server in a process of its own; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            yield port
        finally:
            process.kill()


def make_bucket(port, name):
    server = http.client.HTTPConnection("127.0.0.1", port)
    server.request("PUT", f"/{name}")
    assert server.getresponse().status == 200
    server.close()
