"""Shared fixtures. The CPU platform is installed before anything of Megatron-Core is used."""

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.accelerator.is_available():
    # Triton reads this at its first import, which Megatron-Core's is. With a GPU, kernels are
    # compiled, and tests/gpu runs them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dattn_mcore.parallel import entry, platform  # noqa: E402
from dattn_mcore.parallel.packages import import_problem  # noqa: E402
from tests.ci_skips import (  # noqa: E402, F401  (pytest finds hooks here)
    pytest_make_collect_report,
    pytest_runtest_makereport,
)
from tests.tiers import (  # noqa: E402, F401  (pytest finds hooks here)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

torch.set_num_threads(1)
entry.prepare_imports("auto")


@pytest.fixture(scope="session", autouse=True)
def _platform():
    platform.install("cpu")


@pytest.fixture(autouse=True)
def _handlers_as_before():
    """A command that a test calls logs to an output that pytest takes away afterwards."""
    logger = logging.getLogger("dattn_mcore")
    before = logger.handlers[:]
    yield
    logger.handlers[:] = before


@pytest.fixture
def fresh_imports():
    """`import_problem` forgets what it found before the test, and what it finds in it."""
    import_problem.cache_clear()
    yield
    import_problem.cache_clear()


@pytest.fixture(scope="session")
def pool():
    """CPU workers, shared by all multi-process tests."""
    from tests.distributed.pool import Pool

    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A small digits data set: images, LLaVA annotations, tokenizer."""
    from dattn_mcore.data.digits import DigitsSizes, prepare_digits

    folder = tmp_path_factory.mktemp("data") / "digits"
    sizes = DigitsSizes(align=64, pretrain=64, instruct=96, heldout=16)
    return prepare_digits(folder, sizes)
