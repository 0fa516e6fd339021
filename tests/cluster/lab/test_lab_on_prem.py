"""cluster/on-prem.yaml on three machines over ssh: jobs run, a host may be lost, strangers get nothing."""

import pytest
from machines import run_on_laptop

pytestmark = pytest.mark.lab

MINUTES = 40


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return run_on_laptop("on_prem.py", tmp_path_factory.mktemp("on-prem"), MINUTES * 60)


def test_jobs_run_one_after_the_other(facts):
    assert facts["curated"] > 0
    assert facts["status"] == 0


def test_a_run_on_two_hosts_goes_on_when_one_is_cut_off(facts):
    assert len(facts["hosts_before"]) == 2
    assert facts["lost"] in facts["hosts_before"]
    assert facts["hosts_after"]
    assert facts["lost"] not in facts["hosts_after"]
    assert facts["cause"] == "worker_restart"
    assert facts["steps_again"] <= 2 * facts["checkpoint_every"]


def test_it_ends_right(facts):
    assert facts["steps"] == facts["wanted_steps"]
    assert facts["wrong_tokens"] == []
    assert facts["losses"][1] < 0.7 * facts["losses"][0]


def test_without_the_token_nothing_is_taken(facts):
    assert all(status != 0 for status, _ in facts["without_token"].values())
    assert "token" in facts["without_token"]["ingot submit without a token"][1]


def test_ports_give_a_stranger_nothing_but_metrics(facts):
    """The dashboard and its job server are not among them; what nodes need between them asks for the token."""
    for machine in facts["ports"].values():
        assert {8265, 22} & set(machine["reached"]) == {22}
        for port, asked in machine["asked"].items():
            answers = [status for status, _ in asked["http"].values()] + list(asked["grpc"].values())
            assert answers, f"{port} {asked['program']}: nothing is known of it"
            given = [text for status, text in asked["http"].values() if status == 200]
            assert all(text.startswith("# HELP") or text == "success" for text in given), (port, given)
            assert set(asked["grpc"].values()) <= {"UNAUTHENTICATED"}, (port, asked)


def test_down_leaves_nothing(facts):
    assert facts["left"] == []
