"""All jobs on a workspace in an S3 that throttles and drops connections, held against the same jobs on a local one."""

import contextlib
import http.client
import http.server
import json
import logging
import random
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter

import pytest
import yaml

from jobs.run_folder import StoredRun, valid_steps
from pipelines import storage

# What a user types; one Ray for all of it.
PROGRAM = """
import sys
from jobs import cli
from jobs.session import ray_session
with ray_session(2):
    for job in ("curate", "tokenizer", "tokenize", "pretrain", "evaluate", "generate", "export", "report", "tune"):
        for recipe in sys.argv[1:] if job != "tune" else sys.argv[-1:]:
            print("##", job, flush=True)
            if status := cli.main([job, "--config", recipe]):
                sys.exit(status)
"""


class UnreliableWay(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a server; some it answers itself with 503, some it drops amid the body or the answer."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()

    def handle_request(self):
        fault = self.server.fault(self.command)
        if fault == "body dropped":
            self.rfile.read(100)
            return self.drop(fault)
        body = self.body()
        if fault == "throttled":
            told = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self.server.faults[fault] += 1
            return self.answer(503, [("Content-Type", "application/xml"), ("Content-Length", len(told))], told)
        server = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        with contextlib.closing(server):
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            headers = [pair for pair in answer.getheaders() if pair[0] not in ("Connection", "Server", "Date")]
            data = answer.read()
        if fault == "answer dropped" and data:
            self.answer(answer.status, headers, data[: len(data) // 2])
            return self.drop(fault)
        return self.answer(answer.status, headers, data)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, headers, data):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def drop(self, fault):
        self.server.faults[fault] += 1
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no end
        self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request  # noqa: N815


class Way(http.server.ThreadingHTTPServer):
    """Where clients find the S3 server behind it."""

    daemon_threads = True

    def __init__(self, behind, share):
        super().__init__(("127.0.0.1", 0), UnreliableWay)
        self.behind, self.share, self.draw = behind, share, random.Random(0)
        self.struck, self.faults = Counter(), Counter()

    def fault(self, method):
        if self.draw.random() >= self.share.get(method, 0.005):
            return None
        self.struck[method] += 1
        kinds = {"PUT": ("body dropped", "throttled"), "GET": ("answer dropped", "throttled")}
        return kinds.get(method, ("throttled", "throttled"))[self.struck[method] % 2]

    def handle_error(self, request, client_address):
        pass


@pytest.fixture
def bucket(monkeypatch):
    """A bucket behind an unreliable way, and that way."""
    pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    way = Way(server.server_port, share={"PUT": 0.04, "GET": 0.02})
    for each in (server, way):
        threading.Thread(target=each.serve_forever, args=(0.05,), daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{way.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.server_port}")
    client.create_bucket(Bucket="bucket")
    yield "s3://bucket", way
    client.close()
    way.shutdown()
    server.shutdown()


def write_recipe(path, workspace, texts, **training):
    sections = {
        "workspace": workspace,
        "curate": {"sources": [{"kind": "jsonl", "path": texts, "rules": []}]},
        "tokenizer": {"vocab_size": 400},
        "tokenize": {"validation_share": 0.1},
        "pretrain": {
            "name": "tiny",
            "model": {"preset": "nano", "n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64},
            "device": "cpu",
            "sequence_length": 32,
            "global_batch": 4,
            "steps": 8,
            "checkpoint_every": 3,
            "validate_every": 4,
            "validation_samples": 4,
            "clean_after": 1,
            "schedule": {"warmup_steps": 1},
            **training,
        },
        "evaluate": {"validation_samples": 4},
        "generate": {"prompt": "The house", "max_new_tokens": 12},
        "export": {},
        "report": {},
        "tune": {
            "trials": 1,
            "comparisons": 2,
            "pretrain": {
                "model": {"preset": "nano", "n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64},
                "device": "cpu",
                "sequence_length": 32,
                "global_batch": 4,
                "steps": 4,
                "validation_samples": 4,
                "schedule": {"warmup_steps": 1},
            },
        },
    }
    path.write_text(yaml.safe_dump(sections))
    return str(path)


def content(workspace, *endings):
    """All files below a workspace with one of these endings, by their name in it."""
    files = storage.list_files(workspace, hidden=True)
    return {f.uri[len(workspace) :]: storage.read_bytes(f.uri) for f in files if f.uri.endswith(endings)}


@pytest.mark.lab
def test_all_jobs_do_the_same_on_an_object_store_that_throttles_and_drops_connections(bucket, tmp_path):
    root, way = bucket
    draw = random.Random(0)
    words = ["house", "river", "letter", "machine", "garden", "window", "road", "ship", "table", "bird", "engine"]
    documents = [
        " ".join(f"The {draw.choice(words)} sees the {draw.choice(words)} {draw.randrange(999)}." for _ in range(40))
        for _ in range(60)
    ]
    texts = f"{root}/texts.jsonl"
    storage.write_bytes(texts, "".join(json.dumps({"text": text}) + "\n" for text in documents).encode())
    here, there = f"{tmp_path}/project", f"{root}/project"
    recipes = [
        write_recipe(tmp_path / "here.yaml", here, texts),
        write_recipe(tmp_path / "there.yaml", there, texts, faults={"kill_worker_at_step": 6}),
    ]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *recipes], capture_output=True, text=True, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert set(way.faults) == {"throttled", "body dropped", "answer dropped"}
    expected, found = (content(workspace, ".parquet", ".safetensors", "tokenizer.json") for workspace in (here, there))
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    runs = [StoredRun(f"{workspace}/runs/tiny") for workspace in (here, there)]
    for key in ("batch_hash", "loss", "validation_loss"):
        steps, same = ({step: row[key] for step, row in valid_steps(run.metrics(), key).items()} for run in runs)
        assert same == steps
    ends = [{**run.events()[-1], "time": 0} for run in runs]
    assert ends[0] == ends[1]
    assert [e["from_step"] for e in runs[1].events() if e["event"] == "resume"] == [3]
    scores = [storage.read_json(f"{workspace}/evals/tiny/results.json") for workspace in (here, there)]
    assert scores[0]["validation_loss"] == scores[1]["validation_loss"]
    told = done.stdout.split("## ")
    assert told.count("generate\n" + next(said for said in told if "The house" in said).partition("\n")[2]) == 2
    assert b"finished" in storage.read_bytes(f"{there}/runs/tiny/report.html")
    trials = storage.read_json(f"{there}/sweeps/sweep/results.json")["trials"]
    assert [trial["state"] for trial in trials] == ["finished"]
