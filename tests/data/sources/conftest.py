import pytest
from messy_images import MessyTree, write_messy_tree


@pytest.fixture(scope="session")
def messy_tree(tmp_path_factory) -> MessyTree:
    """The messy tree; tests that change it make their own."""
    return write_messy_tree(tmp_path_factory.mktemp("messy"))
