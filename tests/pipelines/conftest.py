"""A web server on the loopback that breaks connections, throttles, and ignores ranges when it is told to."""

import http.server
import re
import threading

import pytest


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``; takes the first of ``faults`` for each request of a path that it names (None: of any)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.ranges = {}, [], [], True
        self.version = '"1"'
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def uri(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        wanted, server = self.headers.get("Range"), self.server
        server.requests.append((self.path, wanted, self.headers["User-Agent"]))
        fault, *how = server.faults.pop(0) if server.faults else (None,)
        data = server.files.get(self.path)
        if fault == "status":
            return self.give(how[0], b"wait", **(how[1] if len(how) > 1 else {}))
        if data is None:
            return self.give(404, b"")
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if start >= len(data) > 0:
            return self.give(416, b"")
        span = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        cut = how[0] if fault == "cut" else None
        return self.give(206 if start else 200, data[start:], cut, ETag=server.version, **span)

    def give(self, status, data, cut=None, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(data)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()
