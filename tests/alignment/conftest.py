import jaxtyping
import pytest


@pytest.fixture
def unchecked_shapes():
    """As in production: shapes are not checked at run time, and Dynamo can trace the functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
