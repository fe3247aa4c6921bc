"""What `serve` decides before it starts anything, and what it refuses."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agent_rl.settings import Settings, load
from server.launch import LaunchError, complete, only_one, read_settings, wanted_roles, write_settings
from server.private_redis import redis_command


def settings(home: Path, **options: object) -> Settings:
    return load(None, {"home": home, "gateway.port": 0, **options})


def test_an_embedded_deployment_is_completed(tmp_path: Path) -> None:
    done = complete(settings(tmp_path))
    assert done.engine.url == f"http://127.0.0.1:{done.engine.port}"
    assert done.engine.port != 0
    assert done.gateway.port != 0
    assert done.engine.admin_key is not None
    assert done.engine.model == tmp_path / "models" / "smollm2-135m-instruct"
    assert wanted_roles(done) == ["engine", "recorder", "judge", "publisher", "learner", "gateway"]


def test_an_engine_elsewhere_is_not_started(tmp_path: Path) -> None:
    done = complete(settings(tmp_path, **{"engine.url": "http://10.0.0.1:30000", "engine.model": tmp_path}))
    assert done.engine.url == "http://10.0.0.1:30000"
    assert "engine" not in wanted_roles(done)
    with pytest.raises(LaunchError, match=r"engine\.model"):
        complete(settings(tmp_path, **{"engine.url": "http://10.0.0.1:30000"}))


def test_the_open_network_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="not loopback"):
        complete(settings(tmp_path, **{"gateway.host": "0.0.0.0", "gateway.require_key": False}))


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"127.0.0.1:{port}"):
            complete(settings(tmp_path, **{"gateway.port": port}))


def test_complete_settings_survive_the_file_and_only_we_can_read_it(tmp_path: Path) -> None:
    done = complete(settings(tmp_path))
    path = write_settings(done)
    assert read_settings(path) == done
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_one_home_is_served_once(tmp_path: Path) -> None:
    code = f"from server.launch import *\nwith only_one(Path({str(tmp_path)!r})): pass"
    with only_one(tmp_path):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "already" in second.stderr
    with only_one(tmp_path):
        pass


def test_a_socket_path_too_long_for_the_system_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too long for a socket"):
        redis_command(tmp_path / ("x" * 100))
