"""What someone on the network without the token gets from a cluster: which ports open, and what they answer."""

import contextlib
import http.client
import json
import socket

# Of every service that a node of Ray offers over gRPC one method that gives something away or changes something.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.RuntimeEnvService/GetRuntimeEnvsInfo",
    "/ray.rpc.RayletDriver/ClusterInfo",
)
PATHS = (
    ("GET", "/"),
    ("GET", "/metrics"),
    ("GET", "/api/version"),
    ("GET", "/api/jobs/"),
    ("GET", "/api/local_raylet_healthz"),
    ("POST", "/api/job_agent/jobs/"),
    ("POST", "/get_runtime_envs_info"),
)


def listening(machine):
    """Addresses on which a machine listens, as ``[(address, port, program)]``."""
    rows = []
    for line in machine.inside("ss", "-ltnpH").splitlines():
        fields = line.split()
        address, _, port = fields[3].rpartition(":")
        program = fields[5].split('"')[1] if len(fields) > 5 else "?"
        rows.append((address.strip("[]").split("%")[0], int(port), program))
    return sorted(rows)


def open_ports(ip, ports=range(1, 65536)):
    """The TCP ports of an address, of all or some, that accept a connection."""
    found = []
    for port in ports:
        with socket.socket() as knocking:
            knocking.settimeout(5)
            # A socket that happens to be given the very port it knocks at answers itself.
            if knocking.connect_ex((ip, port)) == 0 and knocking.getsockname() != (ip, port):
                found.append(port)
    return found


def over_http(ip, port):
    """What a port answers over HTTP without a token, as ``{request: [status, beginning of the answer]}``."""
    answers = {}
    for method, path in PATHS:
        connection = http.client.HTTPConnection(ip, port, timeout=5)
        try:
            body = json.dumps({"entrypoint": "true"}) if method == "POST" else None
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answers[f"{method} {path}"] = [answer.status, answer.read(200).decode(errors="replace")]
        except (OSError, http.client.HTTPException):  # no HTTP there
            break
        finally:
            connection.close()
    return answers


def over_grpc(ip, port):
    """The status that a port gives to calls without a token, for the methods that it knows."""
    import grpc

    told = {}
    with grpc.insecure_channel(f"{ip}:{port}") as channel:
        for method in METHODS:
            call = channel.unary_unary(method, lambda message: message, lambda message: message)
            try:
                call(b"", timeout=5)
                told[method] = "OK"
            except grpc.RpcError as error:
                if error.code().name == "UNAVAILABLE":  # no gRPC there
                    break
                if error.code().name != "UNIMPLEMENTED":
                    told[method] = error.code().name
    return told


def scan(lab, machines):
    """Knock at every port of every machine, ask what answers for something, and write all of it down."""
    found = {}
    for machine in machines:
        listeners = listening(machine)
        names = {port: program for _, port, program in listeners}
        reached = open_ports(machine.ip)
        lab.tell(f"ports of {machine.name} that open: {', '.join(f'{p} {names.get(p)}' for p in reached)}")
        asked = {}
        for port in reached:
            if names.get(port) == "sshd":
                continue
            web = over_http(machine.ip, port)
            asked[port] = {"program": names.get(port), "http": web, "grpc": {} if web else over_grpc(machine.ip, port)}
            lab.tell(f"  {port} without a token: {_in_words(asked[port])}")
        found[machine.name] = {"listeners": listeners, "reached": reached, "asked": asked}
    lab.note(ports=found)


def _in_words(asked):
    answers = asked["http"].values()
    given = [what for what, (status, _) in asked["http"].items() if status == 200]
    if given and all(text.startswith("# HELP") for status, text in answers if status == 200):
        return "metrics, whatever is asked"
    if answers:
        return f"HTTP {sorted({status for status, _ in answers})}, given: {', '.join(given) or 'nothing'}"
    return f"gRPC {', '.join(sorted(set(asked['grpc'].values()))) or 'without a method that is known'}"


def without_token(lab, head):
    """What submitting and Ray's own programs get without the token, and with a wrong one."""
    none = {"HOME": str(lab.folder), "RAY_AUTH_TOKEN": ""}
    wrong = {**none, "RAY_AUTH_TOKEN": "0" * 64}
    off = {**none, "RAY_AUTH_MODE": "disabled"}
    submit = ["ingot", "submit", "report", "--workspace", lab.workspace]
    tries = {
        "ingot submit without a token": (submit, none),
        "ingot submit with a wrong token": (submit, wrong),
        "ray status without a token": (["ray", "status", "--address", f"{head}:6379"], off),
        "ray job submit without a token": (
            ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--", "true"],
            off,
        ),
    }
    answers = {}
    for what, (command, environment) in tries.items():
        answer = lab.run(*command, environment=environment, check=False)
        last = (answer.stdout.strip().splitlines() or [""])[-1]
        lab.tell(f"{what}: exit status {answer.returncode}; {last[:160]}")
        answers[what] = [answer.returncode, answer.stdout[-2000:]]
    lab.note(without_token=answers)


def leftovers(machine):
    """Processes of Ray and ports, after the end."""
    rows = machine.inside("ps", "-eo", "args", "--no-headers").splitlines()
    ours = [row for row in rows if any(name in row for name in ("ray::", "raylet", "gcs_server", "site-packages/ray/"))]
    return ours + [f"port {port} {program}" for _, port, program in listening(machine) if program != "sshd"]


def gone(lab, machines):
    """Wait until nothing of Ray is left on machines, and write down what is there in the end."""
    with contextlib.suppress(TimeoutError):
        lab.until("nothing of Ray is left", lambda: not any(map(leftovers, machines)), 240, every=3)
    lab.note(left=[row for machine in machines for row in leftovers(machine)])
