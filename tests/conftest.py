import os
from pathlib import Path

import pytest
import torch

# Several tests start processes of their own; one thread each keeps two cores from thrashing.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def double():
    """Default dtype float64 within the test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("GRAPHMOE_TEST_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no data sets in {path}; set GRAPHMOE_TEST_DATA")
    return path
