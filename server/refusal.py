"""Why a request is not answered, and how that looks: in OpenAI's shape, or in Anthropic's under its paths."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import orjson
from starlette.responses import Response


class Refusal(Exception):
    """An expected outcome, not a fault: `status` as in HTTP, `code` for programs, the message for people."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))


def bad_field(name: str, complaint: str, code: str = "invalid_value") -> Refusal:
    """A field of the request's body that cannot be used."""
    return Refusal(400, f"'{name}': {complaint}", code=code, param=name)


def error_response(path: str, refusal: Refusal) -> Response:
    """In the shape that clients of this path know."""
    return anthropic_error(refusal) if path.startswith("/v1/messages") else openai_error(refusal)


# ------------------------------------------------------------------------------------------------------- OpenAI

OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def openai_error_body(refusal: Refusal) -> bytes:
    """`{"error": {message, type, param, code}}`, as JSON."""
    kind = OPENAI_TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    error = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}
    return orjson.dumps({"error": error})


def openai_error(refusal: Refusal) -> Response:
    return Response(openai_error_body(refusal), refusal.status, refusal.headers, "application/json")


# ---------------------------------------------------------------------------------------------------- Anthropic

ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def request_id() -> str:
    """A fresh one, for answers that belong to no turn."""
    return f"req_{os.urandom(12).hex()}"


def anthropic_error_body(refusal: Refusal, request: str) -> bytes:
    """`{"type": "error", "error": {type, message}, "request_id"}`, as JSON."""
    kind = ANTHROPIC_TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": refusal.message}, "request_id": request})


def anthropic_error(refusal: Refusal) -> Response:
    request = request_id()
    headers = {**refusal.headers, "request-id": request}
    return Response(anthropic_error_body(refusal, request), refusal.status, headers, "application/json")
