"""What the tests of training share: one small workspace of tokens; every test trains under a name of its own."""

import pytest
from training_bench import make_tokens


@pytest.fixture(scope="session")
def token_workspace(tmp_path_factory, ray_session):
    root = str(tmp_path_factory.mktemp("training") / "project")
    make_tokens(root)
    return root
