"""How `make test` shares the tests out among its processes."""

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

PARITY = "tests/parity"


class FileByFile(LoadFileScheduling):  # type: ignore[misc]
    """Gives each process a file at a time, and the parity tests as one: they share what the reference computed."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return PARITY if file.startswith(PARITY) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Replace xdist's own scheduler for ``--dist loadfile``."""
    return FileByFile(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the parity tests first, which take longest: the other processes do the rest meanwhile."""
    items.sort(key=lambda item: not item.nodeid.startswith(PARITY))
