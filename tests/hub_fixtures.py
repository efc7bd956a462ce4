"""The fixtures of the tests of models by name, loaded as a plugin by each file of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import DATA, FILE, REPOSITORY, Hub, running

from cpuinfer.hub import download


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub with one repository, and an empty store."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(download, "WAITS", (0.0,) * 3)
    with running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.repositories[REPOSITORY] = {"README.md": b"#", FILE: DATA}
        yield hub


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where FILE is to be."""
    return tmp_path / "data/cpuinfer/models" / REPOSITORY / FILE
