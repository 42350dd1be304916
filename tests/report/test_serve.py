"""The report while training: this machine only, new lines as they come."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from logs import evaluation, steps, write_run

from regpt.errors import UsageError
from regpt.report import serve
from regpt.report.serve import HOST, Server


@contextlib.contextmanager
def serving(*runs: Path) -> Iterator[Server]:
    """A server in a thread of its own."""
    with Server(runs, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(server: Server, path: str = "/", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read().decode()


def append(run: Path, entry: dict[str, object]) -> None:
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps(entry) + "\n")


def test_new_lines_come_and_old_ones_are_not_sent_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps(3))
    with serving(run) as server:
        status, headers, text = get(server)
        assert (
            status == 200
            and 'id="live"' in text
            and "connect-src 'self'" in headers["Content-Security-Policy"]
        )
        status, headers, body = get(server, "/data.json")
        assert json.loads(body)["data"]["charts"][0]["lines"][0]["step"] == [1, 2, 3]
        tag = headers["ETag"]
        assert get(server, "/data.json", **{"If-None-Match": tag})[::2] == (304, "")
        append(run, steps(4)[3])
        append(run, evaluation(4, 3.125))
        status, headers, body = get(server, "/data.json", **{"If-None-Match": tag})
        assert status == 200 and headers["ETag"] != tag
        fresh = json.loads(body)
        assert fresh["data"]["charts"][0]["lines"][0]["step"] == [1, 2, 3, 4]
        assert "3.1250" in fresh["sections"]["headline"]


def test_a_run_without_a_line_is_waited_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [])
    with serving(run) as server:
        assert get(server)[0] == 200
        append(run, steps(1)[0])
        assert json.loads(get(server, "/data.json")[2])["data"]["charts"][0]["id"] == "loss"


def test_a_run_that_goes_away_is_said_not_crashed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps(1))
    with serving(run) as server:
        run.rename(tmp_path / "b")
        status, _, text = get(server, "/data.json")
        assert status == 503 and "there is no run at" in text
        (tmp_path / "b").rename(run)
        assert get(server, "/data.json")[0] == 200


def test_a_tab_that_was_closed_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server([write_run(tmp_path / "a", steps(1))], 0) as server:
        for kind in (ConnectionResetError, BrokenPipeError, ZeroDivisionError):
            try:
                raise kind
            except kind:
                server.handle_error(None, (HOST, 1))
            assert ("Traceback" in capsys.readouterr().err) == (kind is ZeroDivisionError)


def test_a_connection_that_says_nothing_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < (serve._Handler.timeout or 0) <= 60
    monkeypatch.setattr(serve._Handler, "timeout", 0.05)
    with (
        serving(write_run(tmp_path / "a", steps(1))) as server,
        socket.create_connection((HOST, server.server_port), timeout=30) as idle,
    ):
        assert idle.recv(1) == b""


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", ""])
def test_another_name_is_not_answered(tmp_path: Path, host: str) -> None:
    with serving(write_run(tmp_path / "secret", steps(1))) as server:
        for path in ("/", "/data.json"):
            status, _, text = get(server, path, Host=host)
            assert status == 421 and "secret" not in text
        assert get(server, Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize("path", ["/run.json", "/../run.json", "/%2e%2e/run.json", "//etc/passwd"])
def test_there_is_one_page(tmp_path: Path, path: str) -> None:
    with serving(write_run(tmp_path / "a", steps(1))) as server:
        assert get(server, path)[0] == 404


def test_it_listens_on_the_loopback_alone_and_a_port_in_use_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps(1))
    with Server([run], 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(
            UsageError, match=r"port \d+ on 127\.0\.0\.1 cannot be used: .*in use\.\n  try: --port 0"
        ):
            Server([run], server.server_port)
    with pytest.raises(UsageError, match=r"port 70000 on 127\.0\.0\.1 cannot be used"):
        Server([run], 70000)


def test_it_can_be_started_again_at_once(tmp_path: Path) -> None:
    """The connections that it closed still hold the port for a minute."""
    run = write_run(tmp_path / "a", steps(1))
    with serving(run) as server:
        assert get(server)[0] == 200
        port = server.server_port
    Server([run], port).server_close()


def test_ctrl_c_ends_it_well(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps(1))
    command = [sys.executable, "-m", "regpt", "report", str(run), "--watch", "--port", "0", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    assert url.startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "no longer served\n")
    assert not (run / "report.html").exists()
