"""Journal and stream records: a turn or a feedback as MessagePack, and back."""

from __future__ import annotations

import msgspec

from agent_rl.types import Feedback, Turn

_KINDS: dict[str, type[Turn] | type[Feedback]] = {"turn": Turn, "feedback": Feedback}
_envelope = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_bodies: dict[str, msgspec.msgpack.Decoder[Turn | Feedback]] = {
    kind: msgspec.msgpack.Decoder(body) for kind, body in _KINDS.items()
}


def encode(body: Turn | Feedback) -> bytes:
    return msgspec.msgpack.encode(("turn" if isinstance(body, Turn) else "feedback", body))


def decode(data: bytes) -> Turn | Feedback:
    """Raises ValueError that says what is wrong."""
    try:
        kind, body = _envelope.decode(data)
        return _bodies[kind].decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"this is no record: {error}") from error
    except KeyError as error:
        raise ValueError(f"a record of an unknown kind {error}, expected one of {sorted(_KINDS)}") from error
