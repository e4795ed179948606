"""What all tests share: one server of training processes, started when a test first asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Starts training processes without their seconds of imports."""
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny parts and shards, as `tiny.run_tree` makes and finds them; not to be changed."""
    import tiny

    folder = tmp_path_factory.mktemp("parts")
    tiny.run_tree(folder)
    return folder
