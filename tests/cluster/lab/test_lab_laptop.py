"""cluster/laptop.yaml: a cluster of one machine that nobody else reaches."""

import pytest
from machines import run_on_laptop

pytestmark = pytest.mark.lab

MINUTES = 15


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return run_on_laptop("one_laptop.py", tmp_path_factory.mktemp("laptop"), MINUTES * 60)


def test_nothing_listens_on_other_than_loopback_addresses(facts):
    assert facts["open_from_outside"] == []
    assert {address for address, _, _ in facts["listeners"]} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert {6379, 8265} <= set(facts["open_on_loopback"])


def test_a_job_with_the_token_runs_and_one_without_is_refused(facts):
    assert facts["status"] == 0
    assert all(status != 0 for status, _ in facts["without_token"].values())


def test_down_leaves_nothing(facts):
    assert facts["left"] == []
