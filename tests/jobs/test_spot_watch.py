import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs.spot_watch import Notice, aws_notice, azure_notice, google_notice, main, watch


class Metadata:
    """A metadata service: answers by path, to those alone who send the header that its cloud asks for."""

    def __init__(self):
        self.answers, self.header, self.value = {}, None, None
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
                self.answer(200 if seconds else 400, "a token")

            def do_GET(self):
                if self.headers.get(service.header) != service.value:
                    self.answer(401, "")
                elif (answer := service.answers.get(self.path)) is None:
                    self.answer(404, "")
                else:
                    self.answer(200, answer)

            def answer(self, status, text):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def metadata():
    service = Metadata()
    yield service
    service.server.shutdown()
    service.server.server_close()


@pytest.fixture
def aws(metadata):
    metadata.header, metadata.value = "X-aws-ec2-metadata-token", "a token"
    return metadata


@pytest.fixture
def google(metadata):
    metadata.header, metadata.value = "Metadata-Flavor", "Google"
    metadata.answers["/computeMetadata/v1/instance/preempted"] = "FALSE"
    return metadata


@pytest.fixture
def azure(metadata):
    metadata.header, metadata.value = "Metadata", "true"
    metadata.answers["/metadata/scheduledevents?api-version=2020-07-01"] = '{"DocumentIncarnation": 1, "Events": []}'
    metadata.answers["/metadata/instance/compute/name?api-version=2021-02-01&format=text"] = "pool_1"
    return metadata


def azure_event(kind, machine, status="Scheduled", at="Mon, 19 Sep 2016 18:29:47 GMT"):
    return (
        f'{{"DocumentIncarnation": 2, "Events": [{{"EventId": "1", "EventType": "{kind}", "ResourceType": '
        f'"VirtualMachine", "Resources": ["{machine}"], "EventStatus": "{status}", "NotBefore": "{at}"}}]}}'
    )


def test_aws_announces_an_interruption_two_minutes_before(aws):
    assert aws_notice(aws.url) is None
    aws.answers["/latest/meta-data/spot/instance-action"] = '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}'
    notice = aws_notice(aws.url)
    assert notice.deadline == 1505722920
    assert "terminate" in notice.message


def test_aws_recommendation_to_move_counts_only_when_asked_for(aws):
    aws.answers["/latest/meta-data/events/recommendations/rebalance"] = '{"noticeTime": "2020-10-27T08:22:00Z"}'
    assert aws_notice(aws.url) is None
    assert aws_notice(aws.url, rebalance=True).deadline == pytest.approx(time.time() + 120, abs=60)


def test_google_announces_a_preemption_and_leaves_30_seconds(google):
    assert google_notice(google.url) is None
    google.answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
    assert google_notice(google.url).deadline == pytest.approx(time.time() + 30, abs=20)


def test_azure_announces_an_eviction_with_its_time(azure):
    assert azure_notice(azure.url) is None
    azure.answers["/metadata/scheduledevents?api-version=2020-07-01"] = azure_event("Preempt", "pool_1")
    assert azure_notice(azure.url).deadline == 1474309787


@pytest.mark.parametrize(("kind", "machine"), [("Preempt", "pool_2"), ("Freeze", "pool_1")])
def test_azure_events_of_other_machines_and_harmless_ones_are_none_of_our_business(azure, kind, machine):
    azure.answers["/metadata/scheduledevents?api-version=2020-07-01"] = azure_event(kind, machine)
    assert azure_notice(azure.url) is None


def test_an_azure_event_that_has_started_leaves_no_time(azure):
    event = azure_event("Preempt", "pool_1", "Started", "")
    azure.answers["/metadata/scheduledevents?api-version=2020-07-01"] = event
    assert azure_notice(azure.url).deadline == pytest.approx(time.time(), abs=20)


def test_the_node_is_drained_once_though_metadata_and_ray_come_late():
    notice = Notice(time.time() + 30, "preempted")
    looks = iter([OSError("no route"), None, notice, notice, notice])
    drains = iter([ConnectionError("no cluster"), [], ["abc"]])
    asked = []

    def look():
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    def drain(notice):
        asked.append(notice)
        found = next(drains)
        if isinstance(found, Exception):
            raise found
        return found

    assert watch(look, drain, every=0) == ["abc"]
    assert asked == [notice] * 3


def test_only_aws_recommends_to_move(capsys):
    with pytest.raises(SystemExit):
        main(["--cloud", "gcp", "--rebalance"])
    assert "only AWS" in capsys.readouterr().err
