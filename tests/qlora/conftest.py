import pytest

from tests.qlora.models import save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a tiny float32 base, for loading in nf4."""
    return save_base(tmp_path_factory.mktemp("base"))
