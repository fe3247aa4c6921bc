"""Why a request is not answered, in words that any wire can put into its own shape."""

from __future__ import annotations

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
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, round(self.retry_after_s)))}


def bad_field(name: str, complaint: str, code: str = "invalid_value") -> Refusal:
    """A field of the request's body that cannot be used."""
    return Refusal(400, f"'{name}': {complaint}", code=code, param=name)


ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def openai_error_body(refusal: Refusal) -> bytes:
    """`{"error": {message, type, param, code}}`, as JSON."""
    kind = ERROR_TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    error = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}
    return orjson.dumps({"error": error})


def openai_error(refusal: Refusal) -> Response:
    return Response(openai_error_body(refusal), refusal.status, refusal.headers, "application/json")
