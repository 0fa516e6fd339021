"""The laboratory of cluster/laptop.yaml: one machine that brings a cluster up on itself."""

import os
import sys
from pathlib import Path

import yaml
from machines import ROOT, Laptop, call, for_the_laboratory
from strangers import gone, listening, open_ports, without_token
from work import submit, write_recipe

IP = "192.168.1.1"


def main(folder):
    config = yaml.safe_load((ROOT / "cluster/laptop.yaml").read_text())
    lab = Laptop(folder, f"{IP}/24", config["auth"]["ssh_user"])
    key = os.path.expanduser(config["auth"]["ssh_private_key"])
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    lab.let_itself_in([Path(f"{key}.pub").read_text()])
    path, changed = for_the_laboratory(config, folder)
    lab.tell("of cluster/laptop.yaml are changed, as there is no internet, the setup commands:")
    for before, after in changed:
        lab.tell(f"  {before}  ->  {after}")
    lab.cluster_file = path
    lab.run("ray", "get-auth-token", "--generate", log="token.log")
    lab.run("ray", "up", "-y", "--no-config-cache", str(path), log="up.log")
    lab.until("`ray up` is done, the dashboard answers", lambda: open_ports("127.0.0.1", [8265]))
    recipe = write_recipe(lab)
    without_token(lab, "127.0.0.1")
    lab.note(status=submit(lab, "curate", recipe))
    lab.note(listeners=listening(lab), open_from_outside=open_ports(IP), open_on_loopback=open_ports("127.0.0.1"))
    lab.tell(
        f"ports that open at {IP}: {lab.facts['open_from_outside']}, on the loopback: {lab.facts['open_on_loopback']}"
    )
    lab.run("ray", "down", "-y", str(path), log="down.log")
    gone(lab, [lab])


if __name__ == "__main__":
    main(sys.argv[1])
