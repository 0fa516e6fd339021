"""A cloud on the laptop that speaks AWS: moto answers its API, and every instance that runs is a machine of `machines`.

The metadata service stands at its true address, 169.254.169.254, asks for IMDSv2's token, hands out the credentials of
the instance's profile and announces spot interruptions. Every request to the API that changes something is
written down.
"""

import json
import logging
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from machines import call

REGION = "us-west-2"
METADATA = "169.254.169.254"
PORT = 5000
TOKEN = "a-token-of-IMDSv2"


class Cloud:
    """Switches machines on and off as the API is asked to, from a thread of its own.

    Args:
        lab: the laptop.
        boot_seconds: from an instance's start until its sshd answers.

    Attributes:
        spot_capacity: whether there are spot instances to be had.
        refused: how often one was asked for when there were none.
    """

    def __init__(self, lab, boot_seconds=3.0):
        import boto3
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.lab, self.boot_seconds = lab, boot_seconds
        self.requests, self.notices, self.on, self.profiles = [], {}, {}, {}
        self.spot_capacity, self.refused = True, 0
        call("ip", "addr", "add", f"{METADATA}/32", "dev", "br0")
        self.url = f"http://{lab.address.ip}:{PORT}"
        self._write_down()
        ThreadedMotoServer(str(lab.address.ip), PORT, verbose=False).start()
        keys = {"aws_access_key_id": "laptop", "aws_secret_access_key": "laptop"}
        session = boto3.Session(region_name=REGION, **keys)
        self.ec2, self.iam, self.s3 = (session.client(n, endpoint_url=self.url) for n in ("ec2", "iam", "s3"))
        service = ThreadingHTTPServer((METADATA, 80), self._metadata())
        threading.Thread(target=service.serve_forever, daemon=True).start()
        threading.Thread(target=self._boot_and_end, daemon=True).start()

    def instances(self, *states):
        """Instances as EC2 describes them, their tags as a dict; without states those that pend or run."""
        wanted = [{"Name": "instance-state-name", "Values": list(states or ("pending", "running"))}]
        found = []
        for reservation in self.ec2.describe_instances(Filters=wanted)["Reservations"]:
            for instance in reservation["Instances"]:
                instance["Tags"] = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
                found.append(instance)
        return found

    def kinds(self):
        """Ray's node types of the instances that are there."""
        return sorted(instance["Tags"].get("ray-user-node-type", "?") for instance in self.instances())

    def security_group(self, name):
        """Make a security group as the cluster's file asks for, and return its id."""
        (vpc,) = self.ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
        group = self.ec2.create_security_group(GroupName=name, Description=name, VpcId=vpc["VpcId"])["GroupId"]
        inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": vpc["CidrBlock"]}]}
        self.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[inside, ssh])
        return group

    def announce(self, instance, seconds):
        """Tell an instance that it will be taken back."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
        self.notices[instance["PrivateIpAddress"]] = json.dumps({"action": "terminate", "time": at})

    def take(self, instance):
        """Take an instance back."""
        self.ec2.terminate_instances(InstanceIds=[instance["InstanceId"]])

    def asked(self, action):
        """What the API received for an action, one dict a request, names as EC2's query has them."""
        return [request for request in self.requests if request.get("Action") == action]

    def _write_down(self):
        from moto.core.responses import BaseResponse
        from moto.ec2.exceptions import EC2ClientError
        from moto.ec2.responses.instances import InstanceResponse

        call, run = BaseResponse.call_action, InstanceResponse.run_instances

        def call_action(response):
            request = {name: values[-1] for name, values in response.querystring.items()}
            if not request.get("Action", "").startswith("Describe"):
                self.requests.append(request)
            return call(response)

        def run_instances(response):
            if "InstanceMarketOptions.MarketType" in response.querystring and not self.spot_capacity:
                self.refused += 1
                raise EC2ClientError("InsufficientInstanceCapacity", "There is no Spot capacity available.")
            return run(response)

        BaseResponse.call_action, InstanceResponse.run_instances = call_action, run_instances

    def _boot_and_end(self):
        while True:
            for instance in self.instances("running"):
                if instance["InstanceId"] not in self.on:
                    self._switch_on(instance)
            for instance in self.instances("shutting-down", "terminated", "stopping", "stopped"):
                if self.on.get(instance["InstanceId"]):
                    self.lab.tell(f"cloud: {_name(instance)} ends")
                    self.on[instance["InstanceId"]].kill()
                    self.on[instance["InstanceId"]] = None
            time.sleep(0.5)

    def _switch_on(self, instance):
        market = instance.get("InstanceLifecycle", "on-demand")
        kind, ip = instance["Tags"].get("ray-user-node-type"), instance["PrivateIpAddress"]
        self.lab.tell(f"cloud: {_name(instance)} starts, {market} {instance['InstanceType']} for {kind}, {ip}")
        self.profiles[ip] = instance.get("IamInstanceProfile", {}).get("Arn", "").rpartition("/")[2]
        time.sleep(self.boot_seconds)
        keys = [
            subprocess.run(["ssh-keygen", "-y", "-f", str(path)], capture_output=True, text=True, check=True).stdout
            for path in (self.lab.home / ".ssh").glob("*.pem")
        ]
        self.on[instance["InstanceId"]] = self.lab.machine(instance["InstanceId"], ip, keys)

    def _metadata(self):
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                self._answer(200 if self.path == "/latest/api/token" else 404, TOKEN)

            def do_GET(self):
                if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
                    self._answer(401, "")
                    return
                ip = self.client_address[0]
                profile = cloud.profiles.get(ip)
                role = "/latest/meta-data/iam/security-credentials"
                expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 6 * 3600))
                keys = {"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": profile, "SecretAccessKey": "x"}
                answers = {
                    "/latest/meta-data/spot/instance-action": cloud.notices.get(ip),
                    role: profile,
                    f"{role}/{profile}": json.dumps({**keys, "Token": "x", "Expiration": expires}),
                    "/latest/meta-data/placement/region": REGION,
                }
                found = answers.get(self.path.rstrip("/"))
                self._answer(404 if found is None else 200, found or "")

            def _answer(self, status, text):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        return Handler


def _name(instance):
    return f"{instance['InstanceId'][:6]}…{instance['InstanceId'][-3:]}"
