"""What must be there before the roles start: the schema, the model, the policy and the first key."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from agent_rl import models
from agent_rl.experience import lineage
from agent_rl.experience.store import Store, migrate
from agent_rl.experience.tenancy import hash_key
from agent_rl.settings import Settings

TENANT = POLICY = "default"
FIRST_KEY_SCOPES = ("agent", "feedback", "admin")  # the owner's key


async def prepare(settings: Settings, show: Callable[[str], None]) -> None:
    """Idempotent. Raises ValueError where the home folder was made with another base model."""
    folder = settings.engine.model
    assert folder is not None  # `complete` sets it
    if folder == settings.smollm2_dir:
        models.prepare_smollm2(folder, show)
    await migrate(settings.database_url)
    store = await Store.open(settings.database_url)
    try:
        await store.ensure_tenant(TENANT, TENANT)
        await lineage.ensure_policy(store, TENANT, POLICY, models.base_hash(folder))
        await first_key(store, settings.home / "key")
    finally:
        await store.close()


async def first_key(store: Store, path: Path) -> None:
    """A key for the owner, in a file that only they can read; made once."""
    if path.exists() and await store.key(hash_key(path.read_text().strip())):
        return
    key = "arl-" + secrets.token_urlsafe(32)
    await store.add_key(TENANT, hash_key(key), FIRST_KEY_SCOPES, "owner")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key + "\n")
