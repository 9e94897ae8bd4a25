"""Reference runs that several tests of training share."""

import pytest

from tests.varedit_jax.training.runs import Outcome, Run, outcome


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The results of an uninterrupted run."""
    run = Run(tmp_path_factory.mktemp("whole"))
    return outcome(run, *run())
