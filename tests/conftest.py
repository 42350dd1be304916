"""What every test may ask for."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regpt.config import Config
from tiny import TINY_TEXT, tiny_config


def pytest_configure() -> None:
    """Signals as at a terminal: whoever starts the tests in the background may have them ignored, children included."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of shared texts and checkpoints; tests that need it skip, saying so, where it is not given."""
    folder = os.environ.get("REGPT_TEST_DATA")
    if not folder:
        pytest.skip("REGPT_TEST_DATA is not set: it names the folder with the real texts and checkpoints")
    return Path(folder)


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Settings of a run that takes a second, in an empty current folder, on a text of its own, dropout on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    (tmp_path / "text.txt").write_text(TINY_TEXT, encoding="utf-8")
    return tiny_config()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that they are fastest on one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A connection to anything but this machine fails the test that asks for it, whatever the code then catches."""

    def guarded(connect: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family != getattr(socket, "AF_UNIX", None) and not _is_loopback(str(address[0])):
                pytest.fail(f"a test reaches for the network: connect to {address!r}")
            return connect(self, address)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        yield


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
