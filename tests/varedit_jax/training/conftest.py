"""What several tests of training compare with."""

import pytest

from tests.varedit_jax.training.runs import Outcome, Run, outcome


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What an uninterrupted run leaves."""
    run = Run(tmp_path_factory.mktemp("whole"))
    return outcome(run, *run())
