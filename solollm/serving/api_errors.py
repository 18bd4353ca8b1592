"""What a client is told when its request is not answered, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error with its HTTP status.

    Attributes:
        code: OpenAI's, where it has one; clients branch on it.
        param: the field of the request to blame.
        retry_after: seconds after which trying again makes sense.
        closes: the connection cannot be used further (a body was left unread).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.closes = closes

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "error": {
                "message": self.message, "type": _kind(self.status), "param": self.param,
                "code": self.code,
            }
        }  # fmt: skip

    def headers(self) -> dict[str, str]:
        found = {}
        if self.retry_after is not None:
            found["retry-after"] = str(self.retry_after)
        if self.closes:
            found["connection"] = "close"
        if self.status == 401:
            # So that a browser asks for the key: any user name, the key as password. Bearer is not
            # named beside it, because Chromium reads one scheme per header and asks for no other.
            found["www-authenticate"] = 'Basic realm="SoloLLM", charset="UTF-8"'
        return found


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that is wrong in itself."""
    return ApiError(400, message, code=code, param=param)


def _kind(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
             429: "rate_limit_error", 503: "service_unavailable_error",
             504: "timeout_error"}  # fmt: skip
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
