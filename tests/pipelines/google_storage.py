"""Google Cloud Storage on the loopback, as a program: its client in pyarrow would stop a server in the same process."""

import http.server
import json
import re
import urllib.parse


class GoogleStorage(http.server.BaseHTTPRequestHandler):
    """As much of Google Cloud Storage's JSON interface as its client asks for.

    Throttles every twentieth request, and drops the connection amid every fifth content.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in ({"Content_Length": len(body), "Content_Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self):
        objects = self.server.objects
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests += 1
        if self.server.requests % 20 == 0:
            return self.answer(503 if self.server.requests % 40 else 429)
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        name = urllib.parse.unquote(url.path.partition("/o/")[2]) or query.get("name") or query.get("upload_id")
        if self.command == "POST":
            self.server.uploads[name] = b""
            place = f"http://127.0.0.1:{self.server.server_port}/upload/storage/v1/b/bucket/o?upload_id="
            return self.answer(200, Location=place + urllib.parse.quote(name, safe=""))
        if self.command == "PUT":
            self.server.uploads[name] += body
            if self.headers["Content-Range"].endswith("/*"):
                held = len(self.server.uploads[name])
                return self.answer(308, **({"Range": f"bytes=0-{held - 1}"} if held else {}))
            objects[name] = self.server.uploads.pop(name)
            return self.answer(200, self.about(name))
        if not name:
            found = [self.about(key) for key in sorted(objects) if key.startswith(query["prefix"])]
            return self.answer(200, {"kind": "storage#objects", "items": found})
        if name not in objects:
            return self.answer(404)
        if self.command == "DELETE":
            del objects[name]
            return self.answer(204)
        if query.get("alt") != "media":
            return self.answer(200, self.about(name))
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")
        start, stop = int(span[1]), int(span[2] or len(objects[name]) - 1) + 1
        part = f"bytes {start}-{stop - 1}/{len(objects[name])}"
        content = objects[name][start:stop]
        self.server.reads += 1
        if self.server.reads % 5 == 0 and len(content) > 1:
            self.close_connection = True
            facts = {"Content_Range": part, "X_Goog_Generation": 1, "Content_Length": len(content)}
            return self.answer(206, content[: len(content) // 2], **facts)
        return self.answer(206, content, Content_Range=part, X_Goog_Generation=1)

    def about(self, name):
        size = str(len(self.server.objects[name]))
        dates = dict.fromkeys(("timeCreated", "updated"), "2024-01-01T00:00:00.000Z")
        return {"kind": "storage#object", "name": name, "bucket": "bucket", "size": size, "generation": "1"} | dates

    do_GET = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GoogleStorage)
    server.objects, server.uploads, server.requests, server.reads = {}, {}, 0, 0
    print(server.server_port, flush=True)
    server.serve_forever()
