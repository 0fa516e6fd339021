"""A laptop and machines that it reaches over ssh, all of them on this one machine.

Each has network, processes, /tmp and host name of its own (namespaces of Linux), an sshd, and a home with nothing but
what an image would bring: a virtual environment with the packages of this one, without Ingot. The checkout is hidden
from the machines, so that what runs there has been brought there. They share the folder ``/mnt/ingot``, as machines
share a file system. Everything ends with the program that ``run_on_laptop`` runs.
"""

import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ("unshare", "nsenter", "ip", "ss", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")
SHARED, HOME = "/mnt/ingot", "/mnt/home"
NAMESPACES = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]

MACHINE = """
set -e
hostname $NAME
ip link set lo up
for try in $(seq 200); do ip link show $LINK >/dev/null 2>&1 && break; sleep 0.05; done
ip link set $LINK name eth0
ip addr add $ADDRESS dev eth0
ip link set eth0 up
ip route add default via $GATEWAY
for kept in $KEPT; do  # of what lies below /tmp, where each machine has files of its own
  case $kept in /tmp/*) mkdir -p $FOLDER$kept; mount --bind $kept $FOLDER$kept;; esac
done
mount --rbind $FOLDER/tmp /tmp
mount -t tmpfs tmpfs /dev/shm
mount --bind $FOLDER/home $HOME
for package in pipelines models jobs; do
  [ ! -d $CHECKOUT/$package ] || mount -t tmpfs tmpfs $CHECKOUT/$package
done
mount --bind $VENV $VENV
mount -o remount,ro,bind $VENV
cd /
exec /usr/sbin/sshd -D -e -f $FOLDER/sshd_config
"""


def missing():
    """What this machine lacks for a laboratory, in words; empty when it can run."""
    lacks = [tool for tool in TOOLS if shutil.which(tool) is None]
    if any(str(path).startswith("/mnt/") for path in (ROOT, sys.prefix)):
        return "needs checkout and virtual environment elsewhere than below /mnt"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    if lacks:
        return f"needs {', '.join(lacks)} (Debian: iproute2, openssh-server, rsync)"
    if subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True).returncode:
        return "needs namespaces, which this container does not allow"
    return ""


def run_on_laptop(script, folder, limit):
    """Run a program of this folder on the laptop and return the facts that it has written down.

    Args:
        script: name of the file.
        folder: for everything that it leaves.
        limit: seconds after which it is ended.
    """
    here = Path(__file__).parent
    # The shell is the laptop's first process, which has to take note of the ends of processes that nobody waits for.
    first = ["bash", "-c", '"$@"; exit $?', "laptop", sys.executable, str(here / script), str(folder)]
    command = ["unshare", *NAMESPACES, "--propagation", "private", *first]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))},
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(here), str(here.parent)]),
        "PYTHONUNBUFFERED": "1",
    }
    program = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        status = program.wait(limit)
    finally:
        program.send_signal(signal.SIGKILL)  # and with it whatever it has started
        program.wait()
    assert status == 0, f"{script} ended with {status}; its logs are in {folder}"
    return json.loads((Path(folder) / "facts.json").read_text())


class Laptop:
    """This process's machine, and the network with the others.

    Args:
        folder: for everything that is left.
        address: the laptop's in the network, such as ``192.168.1.1/24``.
        user: who logs in on the machines; has the rights of root there.
        environment: variables that are set in every shell of the machines.
        storage: what jobs read and write on all machines; the folder that they share, by default.
    """

    def __init__(self, folder, address, user, environment=None, storage=SHARED):
        self.folder, self.user, self.storage = Path(folder), user, storage
        self.workspace = f"{storage}/project"
        # All machines share the cores of one, on which Ray's own processes may start more slowly than Ray bears.
        self.environment = {"RAY_agent_register_timeout_ms": "180000", **(environment or {})}
        self.address = ipaddress.ip_interface(address)
        self.began = time.monotonic()
        self.facts, self.machines, self.cluster_file = {}, {}, None
        self.home = self.folder / "laptop"
        (self.home / ".ssh").mkdir(parents=True)
        self._network()
        self._names()
        os.environ.update(
            HOME=HOME, RAY_AUTH_MODE="token", PATH=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        )
        os.environ.pop("XDG_CONFIG_HOME", None)
        call("hostname", "laptop")

    def tell(self, text):
        """A line of the timeline."""
        line = f"[{time.monotonic() - self.began:6.1f} s] {text}"
        print(line, flush=True)
        with open(self.folder / "timeline.txt", "a") as file:
            print(line, file=file)

    def note(self, **facts):
        """Write down what the test is to judge."""
        self.facts |= facts
        (self.folder / "facts.json").write_text(json.dumps(self.facts, indent=1, default=str))

    def until(self, what, condition, seconds=300, every=0.5):
        """Wait for a condition and tell when it came true; returns its value."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                self.tell(f"NOT WITHIN {seconds} s: {what}")
                raise TimeoutError(what)
            time.sleep(every)
        self.tell(what(found) if callable(what) else what)
        return found

    def run(self, *command, log=None, environment=None, check=True):
        """Run a command in the checkout; what it prints goes into a log, and back."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        if log:
            (self.folder / log).write_text(done.stdout)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-6000:]}")
        return done

    def start(self, *command, log):
        """Start a command in the checkout whose output goes into a log."""
        with open(self.folder / log, "w") as out:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def stop(self, process):
        """End a command that was started, and what it has started."""
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()

    def machine(self, name, ip, keys):
        """Switch a machine on, which lets the public keys in."""
        self.machines[name] = Machine(self, name, ip, keys)
        with open(self.folder / "hosts", "a") as file:
            print(ip, name, file=file)
        return self.machines[name]

    def let_itself_in(self, keys):
        """An sshd on the laptop, on its loopback alone."""
        furnish(self.folder, self.home, "127.0.0.1", keys, self.environment)
        subprocess.Popen(
            ["/usr/sbin/sshd", "-D", "-e", "-f", str(self.folder / "sshd_config")], stderr=subprocess.DEVNULL
        )

    def inside(self, *command):
        """What a command prints."""
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def _network(self):
        call("ip", "link", "set", "lo", "up")
        call("ip", "link", "add", "br0", "type", "bridge")
        call("ip", "addr", "add", str(self.address), "dev", "br0")
        call("ip", "link", "set", "br0", "up")

    def _names(self):
        """Names, users and folders of this machine and of all those started from it."""
        (self.folder / "shared").mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{self.address.ip} laptop\n")
        (self.folder / "resolv.conf").touch()  # no name server: what is not found is not waited for
        # First in the list, so that the user's number, which is root's, stands for this name.
        accounts = f"{self.user}:x:0:0::{HOME}:/bin/bash\n{Path('/etc/passwd').read_text()}"
        (self.folder / "passwd").write_text(accounts)
        call("mount", "-t", "tmpfs", "tmpfs", "/mnt")
        for folder, place in ((self.home, HOME), (self.folder / "shared", SHARED)):
            os.mkdir(place)
            call("mount", "--bind", str(folder), place)
        call("mount", "-t", "tmpfs", "tmpfs", "/tmp/ray")
        for name, place in (("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf"), ("passwd", "/etc/passwd")):
            call("mount", "--bind", str(self.folder / name), os.path.realpath(place))


class Machine:
    """One that is switched on."""

    def __init__(self, laptop, name, ip, keys):
        self.laptop, self.name, self.ip = laptop, name, ip
        self.folder = laptop.folder / name
        self.link = f"v{int(ipaddress.ip_address(ip)) % 2**24}"
        (self.folder / "tmp").mkdir(parents=True)
        (self.folder / "tmp").chmod(0o1777)
        furnish(self.folder, self.folder / "home", ip, keys, laptop.environment)
        self._boot()

    def kill(self):
        """Its power is gone."""
        self._outer.kill()
        self._outer.wait()
        subprocess.run(["ip", "link", "del", self.link], capture_output=True)

    def cut(self):
        """Its network cable is pulled."""
        call("ip", "link", "set", self.link, "down")

    def mend(self):
        """Its network cable is put in again."""
        call("ip", "link", "set", self.link, "up")

    def inside(self, *command):
        """What a command prints that is run on the machine."""
        spaces = ["nsenter", "-t", str(self.pid), "--net", "--mount", "--pid", "--uts", "--ipc"]
        return subprocess.run([*spaces, *command], capture_output=True, text=True, check=True).stdout

    def _boot(self):
        network, peer = self.laptop.address.network, self.link.replace("v", "p", 1)
        call("ip", "link", "add", self.link, "type", "veth", "peer", "name", peer)
        call("ip", "link", "set", self.link, "master", "br0", "up")
        settings = {
            "NAME": self.name,
            "LINK": peer,
            "ADDRESS": f"{self.ip}/{network.prefixlen}",
            "GATEWAY": str(self.laptop.address.ip),
            "FOLDER": str(self.folder),
            "CHECKOUT": str(ROOT),
            "VENV": sys.prefix,
            "KEPT": f"{sys.prefix} {sys.base_prefix} {self.folder}",
            "HOME": HOME,
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        }
        with open(self.folder / "log", "w") as log:
            self._outer = subprocess.Popen(
                ["unshare", *NAMESPACES, "--propagation", "private", "bash", "-c", MACHINE],
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.02)
        self.pid = int(found[0])  # the machine's first process, in the laptop's numbers
        call("ip", "link", "set", peer, "netns", str(self.pid))


def furnish(folder, home, ip, keys, variables):
    """What a machine's image brings: a home with a virtual environment, and an sshd that lets the keys in."""
    (home / ".ssh").mkdir(parents=True, exist_ok=True)
    (home / ".ssh/authorized_keys").write_text("\n".join(keys) + "\n")
    (home / ".ssh/authorized_keys").chmod(0o600)
    (home / ".bashrc").write_text("".join(f"export {name}={value}\n" for name, value in variables.items()))
    (home / ".profile").write_text(". ~/.bashrc\n")
    make_venv(home / "ingot-venv", f"{HOME}/ingot-venv")
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "hostkey"))
    (folder / "sshd_config").write_text(
        f"ListenAddress {ip}\nHostKey {folder}/hostkey\nAuthorizedKeysFile .ssh/authorized_keys\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\nUseDNS no\nPidFile none\n"
        "MaxStartups 100\nMaxSessions 100\nStrictModes no\n"
    )


def make_venv(folder, place):
    """A virtual environment at ``folder`` that works once it is called ``place``: the packages of this one, less Ingot.

    The path file adds a folder, but not what the path files in that folder add, such as a checkout.
    """
    packages = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    real = Path(sys.executable).resolve()
    (folder / "bin/python").symlink_to(real)
    (folder / "pyvenv.cfg").write_text(f"home = {real.parent}\ninclude-system-site-packages = false\n")
    (packages / "image.pth").write_text(f"{sysconfig.get_path('purelib')}\nimport no_cuda\n")
    shutil.copy(Path(__file__).parent / "no_cuda.py", packages)
    for name, module in (("ray", "ray.scripts.scripts"), ("pip", "pip._internal.cli.main")):
        script = folder / "bin" / name
        script.write_text(f"#!{place}/bin/python\nimport sys\n\nfrom {module} import main\n\nsys.exit(main())\n")
        script.chmod(0o755)


def for_the_laboratory(config, folder):
    """A cluster file as it is, but for the setup commands that need the internet; returns file and changed commands.

    The machines' image brings Python's packages, so that of the installation only Ingot itself is left.
    """
    import yaml

    install = "~/ingot-venv/bin/pip install --quiet --no-index --no-deps --no-build-isolation ~/ingot"
    commands, changed = [], []
    for command in config["setup_commands"]:
        needs_internet = any(word in command for word in ("curl ", "pip install", " venv", "apt"))
        if needs_internet:
            changed.append(
                (
                    command,
                    install
                    if "~/ingot" in command.replace("~/ingot-venv", "") or "file://" in command
                    else "(left out)",
                )
            )
            if changed[-1][1] == install:
                commands.append(install)
        else:
            commands.append(command)
    path = Path(folder) / "cluster.yaml"
    path.write_text(yaml.safe_dump({**config, "setup_commands": commands}, sort_keys=False))
    return path, changed


def call(*command):
    """Run a command that has to succeed.

    Raises:
        RuntimeError: with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
