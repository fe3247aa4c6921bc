"""`agent-rl keys | tenants | policies | forget`: administration on the server's machine, straight on the database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

Work = Callable[[Any, Any], Awaitable[None]]  # (store, settings)
WithStore = Callable[[Path | None, Work], None]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of everything that is kept.")]
TenantId = Annotated[str, typer.Option("--tenant", help="Whose.")]
AnyTenant = Annotated[str | None, typer.Option("--tenant", help="None: of every tenant.")]
Limit = Annotated[int | None, typer.Option(min=1, help="None: no limit.")]
DAY_S = 24 * 3600.0


def add_commands(app: typer.Typer, with_store: WithStore, console: Console) -> None:
    """Put these commands into `app`; heavy imports wait until one of them runs."""
    app.add_typer(_keys(with_store, console), name="keys")
    app.add_typer(_tenants(with_store, console), name="tenants")
    app.add_typer(_policies(with_store, console), name="policies")

    @app.command()
    def forget(
        kind: Annotated[str, typer.Argument(help="session | subject | tenant")],
        target: Annotated[str, typer.Argument(help="Its id: a session's may be ours or the client's.")],
        tenant: TenantId = "default",
        home: Home = None,
    ) -> None:
        """Delete everything that was kept of a session, a user or a tenant; says which releases had learned from it."""
        from agent_rl.experience import deletion
        from agent_rl.experience.stream import Stream

        async def work(store: Any, settings: Any) -> None:
            stream = Stream(settings.redis_url, settings.store.stream)
            try:
                whose = target if kind == "tenant" else tenant
                report = await deletion.forget(store, stream, kind, whose, target)
            finally:
                await stream.close()
            console.print(
                f"deleted: {len(report.sessions)} sessions, {report.turns} turns, {report.feedback} feedback, "
                f"{report.lessons} lessons"
            )
            for release in report.releases:
                console.print(f"learned from it, or grew out of what did: {release}")
            for policy in report.policies:
                console.print(f"deleted with its weights, since nobody else taught it: {policy}")

        with_store(home, work)


def _keys(with_store: WithStore, console: Console) -> typer.Typer:
    app = typer.Typer(help="Who may ask. A key is shown once, when it is made.", no_args_is_help=True)

    @app.command("create")
    def create(
        tenant: TenantId = "default",
        scope: Annotated[list[str] | None, typer.Option(help="agent, feedback, admin. Repeatable.")] = None,
        label: str = "",
        requests_per_minute: Limit = None,
        max_concurrency: Limit = None,
        home: Home = None,
    ) -> None:
        """A new key; by default for an agent and for feedback."""
        from agent_rl.experience import tenancy

        async def work(store: Any, settings: Any) -> None:
            limits = {"requests_per_minute": requests_per_minute, "max_concurrency": max_concurrency}
            key, secret = await tenancy.create_key(store, tenant, scope or ("agent", "feedback"), label, **limits)
            console.print(f"{key.api_key_id}  {', '.join(sorted(key.scopes))}")
            console.print(secret, highlight=False)

        with_store(home, work)

    @app.command("list")
    def show(tenant: AnyTenant = None, home: Home = None) -> None:
        """Keys, never their secrets."""
        from agent_rl.experience import tenancy

        async def work(store: Any, settings: Any) -> None:
            key_id = Column("key", min_width=32)  # whole in any terminal: it is what rotate and revoke want
            table = Table(key_id, "tenant", "label", "scopes", "limits", "refused from", box=None, pad_edge=False)
            for key in await tenancy.keys_of(store, tenant):
                limits = f"{_shown(key.requests_per_minute)}/min, {_shown(key.max_concurrency)} at once"
                scopes = ", ".join(sorted(key.scopes))
                table.add_row(key.api_key_id, key.tenant_id, key.label, scopes, limits, _moment(key.revoked_at))
            console.print(table)

        with_store(home, work)

    @app.command("rotate")
    def rotate(
        key: str,
        overlap_s: Annotated[float, typer.Option(min=0, help="How long the old one goes on.")] = DAY_S,
        home: Home = None,
    ) -> None:
        """Another key with the same rights."""
        from agent_rl.experience import tenancy

        async def work(store: Any, settings: Any) -> None:
            fresh, secret = await tenancy.rotate_key(store, key, None, overlap_s)
            console.print(fresh.api_key_id)
            console.print(secret, highlight=False)

        with_store(home, work)

    @app.command("revoke")
    def revoke(key: str, home: Home = None) -> None:
        """Refuse a key; gateways hear of it within twice gateway.cache_s."""
        from agent_rl.experience import tenancy

        async def work(store: Any, settings: Any) -> None:
            await tenancy.revoke_key(store, key, None)
            console.print(f"{key} is refused from now on")

        with_store(home, work)

    return app


def _tenants(with_store: WithStore, console: Console) -> typer.Typer:
    app = typer.Typer(help="Whose data is whose, and what may be done with it.", no_args_is_help=True)

    @app.command("set")
    def decide(
        tenant: str,
        name: str | None = None,
        learn: Annotated[bool | None, typer.Option("--learn/--no-learn", help="May its turns be lessons?")] = None,
        unstored: Annotated[str | None, typer.Option(help="`store: false` means: learn | keep | discard")] = None,
        policies: Annotated[str | None, typer.Option(help="What `default` is: shared | own | subject")] = None,
        retention_s: Annotated[float | None, typer.Option(help="Idle sessions are deleted after; 0: never.")] = None,
        home: Home = None,
    ) -> None:
        """Make a tenant, or change what it has decided."""
        from agent_rl.experience import tenancy

        said = {"name": name, "learn": learn, "unstored": unstored, "policies": policies, "retention_s": retention_s}
        decided: dict[str, Any] = {field: value for field, value in said.items() if value is not None}
        if retention_s == 0:
            decided["retention_s"] = None

        async def work(store: Any, settings: Any) -> None:
            made = asdict(await tenancy.set_tenant(store, tenant, **decided))
            console.print(", ".join(f"{field}: {value}" for field, value in made.items() if field != "hmac_key"))

        with_store(home, work)

    @app.command("list")
    def show(home: Home = None) -> None:
        """All tenants and what they decided."""
        from agent_rl.experience import tenancy

        async def work(store: Any, settings: Any) -> None:
            table = Table("tenant", "name", "learns", "store: false", "policies", "kept for, s", box=None)
            for t in await tenancy.tenants_of(store):
                table.add_row(t.tenant_id, t.name, str(t.learn), t.unstored, t.policies, _shown(t.retention_s))
            console.print(table)

        with_store(home, work)

    return app


def _policies(with_store: WithStore, console: Console) -> typer.Typer:
    app = typer.Typer(help="The models that clients name, and whose lessons teach them.", no_args_is_help=True)

    @app.command("create")
    def make(name: str, tenant: TenantId = "default", home: Home = None) -> None:
        """Another model for the clients of a tenant; it begins with the server's base."""
        from agent_rl.experience import tenancy

        async def work(store: Any, settings: Any) -> None:
            policy = await tenancy.create_policy(store, tenant, name)
            console.print(f"{policy.policy_id} is there")

        with_store(home, work)

    @app.command("list")
    def show(tenant: AnyTenant = None, home: Home = None) -> None:
        """Policies, those of single subjects too."""
        from agent_rl.experience import tenancy

        async def work(store: Any, settings: Any) -> None:
            table = Table("policy", "tenant", "name", "subject", "head", box=None)
            for policy, subject in await tenancy.policies_of(store, tenant):
                table.add_row(policy.policy_id, policy.tenant_id, policy.name, _shown(subject), policy.head or "base")
            console.print(table)

        with_store(home, work)

    return app


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def _moment(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
