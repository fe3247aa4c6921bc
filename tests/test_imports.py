"""Who may import whom, and which file is the one door to a third-party library: any other edge fails."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = [
    "types",
    "settings",
    "rendering",
    "engine",
    "models",
    "parsing",
    "dialects",
    "hindsight",
    "samples",
    "objectives",
    "methods",
    "teachers",
    "training",
    "experience",
    "judge",
    "followups",
    "instructions",
    "monitors",
    "exam",
    "release",
    "intake",
    "learner",
]

# package (longest prefix wins) → what of ours it may import; a package may always import from itself
MAY_IMPORT: dict[str, set[str]] = {
    "agent_rl.types": set(),
    "agent_rl.settings": set(),
    "agent_rl.objectives": set(),
    "agent_rl.rendering": {"agent_rl.types", "agent_rl.parsing", "agent_rl.dialects"},
    "agent_rl.parsing": {"agent_rl.types", "agent_rl.dialects", "agent_rl.calls"},
    "agent_rl.dialects": {"agent_rl.types", "agent_rl.calls"},
    "agent_rl.calls": {"agent_rl.types"},
    "agent_rl.engine": {"agent_rl.types", "agent_rl.engine_answers"},
    "agent_rl.engine_answers": {"agent_rl.types"},
    "agent_rl.models": {"agent_rl.types"},
    "agent_rl.hindsight": {"agent_rl.types"},
    "agent_rl.samples": {"agent_rl.types"},
    "agent_rl.monitors": {"agent_rl.types"},
    "agent_rl.followups": {"agent_rl.types"},
    "agent_rl.instructions": {"agent_rl.types", "agent_rl.monitors"},
    "agent_rl.experience": {"agent_rl.types", "agent_rl.settings"},
    **{
        f"agent_rl.{name}": {
            f"agent_rl.{n}" for n in ["types", "settings", "engine", "rendering", "experience", "monitors"]
        }
        for name in ("exam", "release")
    },
    "agent_rl.judge": {
        f"agent_rl.{n}" for n in ["types", "settings", "engine", "rendering", "experience", "followups", "instructions"]
    },
    "agent_rl.intake": {
        f"agent_rl.{n}"
        for n in ["types", "settings", "engine", "rendering", "experience", "hindsight", "samples", "judge"]
    },
    "agent_rl.methods": {f"agent_rl.{n}" for n in ["types", "hindsight", "samples", "objectives"]},
    **{
        f"agent_rl.{name}": {f"agent_rl.{n}" for n in ["types", "settings", "models", "objectives", "engine"]}
        for name in ("teachers", "training")
    },
    "agent_rl.learner": {f"agent_rl.{n}" for n in CORE},
    "server.engines": {f"agent_rl.{n}" for n in ["types", "settings", "models", "rendering"]},
    "server.preparation": {
        "server.directory",
        *(f"agent_rl.{n}" for n in ["types", "settings", "models", "experience"]),
    },
    "server.cli": {"agent_rl", "server", "environments", "migrations"},
    "server": {
        f"agent_rl.{n}"
        for n in ["types", "settings", "parsing", "rendering", "engine", "experience", "exam", "release", "monitors"]
    },
    "environments": {"agent_rl.types"},
    "migrations": {"agent_rl.types", "agent_rl.settings", "agent_rl.experience"},
}

# library → the files and folders that may import it
DOORS: dict[str, list[str]] = {
    "redis": ["agent_rl/experience/stream.py", "agent_rl/experience/outbox.py"],
    "sqlalchemy": ["agent_rl/experience/", "migrations/"],
    "alembic": ["agent_rl/experience/", "migrations/"],
    "aiohttp": ["agent_rl/engine.py"],
    "transformers": [
        "agent_rl/models.py",
        "agent_rl/rendering.py",
        "agent_rl/training/",
        "server/engines/kv.py",
    ],
    "safetensors": ["agent_rl/models.py", "agent_rl/training/"],
    "torch": [
        "agent_rl/models.py",
        "agent_rl/objectives/",
        "agent_rl/methods/",
        "agent_rl/teachers/",
        "agent_rl/training/",
        "agent_rl/learner.py",
        "server/engines/torch_engine.py",
        "server/engines/runner.py",
        "server/engines/sampling.py",
        "server/engines/kv.py",
    ],
    "megatron": ["agent_rl/training/megatron/"],
    "llguidance": ["server/engines/grammar.py"],
    "fastapi": ["server/"],
    "uvicorn": ["server/"],
    "sglang": [],
    "msgspec": ["agent_rl/experience/"],
    "openai": ["server/demo/", "server/chat.py"],
    "matplotlib": ["server/demo/report.py"],
    "typer": ["server/cli.py", "server/cli_tenants.py"],
    "websockets": ["server/connect.py"],
}


def modules() -> Iterator[tuple[str, str]]:
    """(path, dotted name) of each of our modules."""
    for package in ("agent_rl", "server", "environments", "migrations"):
        for path in sorted((ROOT / package).rglob("*.py")):
            relative = path.relative_to(ROOT)
            yield str(relative), ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def imports(path: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("path", "module"), list(modules()))
def test_every_import_is_allowed(path: str, module: str) -> None:
    for name in imports(path):
        library = name.split(".")[0]
        if library in ("agent_rl", "server", "environments", "migrations"):
            home = max((p for p in MAY_IMPORT if within(module, p)), key=len, default=None)
            assert home or module == "agent_rl", f"{module} stands in no package of the rules"
            allowed = {home, *MAY_IMPORT[home]} if home else set()
            assert any(within(name, p) for p in allowed), f"{module} may not import {name}"
            if home == "server":  # the composition root and the engines are nobody's library
                assert not within(name, "server.cli"), f"{module} may not import {name}"
        elif library in DOORS:
            assert any(path.startswith(door) for door in DOORS[library]), f"{path} may not import {library}"
