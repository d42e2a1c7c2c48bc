"""What went wrong, in OpenAI's error format: one place for the status, the type and the words of each."""

from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.exceptions import HTTPException as AnyHTTPException

from openrlhf.datasets.records import RecordError
from openrlhf.serving.documents import ReadOnly
from openrlhf.serving.engines import EngineError
from openrlhf.serving.schemas import BadRequest
from openrlhf.utils.http import said

BUSY_SECONDS = 2
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def problem(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """An error as a body; its status is in it too, for those that come in the middle of a stream."""
    kind = TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code, "status": status}}


def told(error: Exception) -> tuple[int, dict]:
    """Status and body for an error."""
    if isinstance(error, BadRequest):
        return error.status, problem(error.status, str(error), error.param, error.code)
    if isinstance(error, AnyHTTPException):
        code = {401: "invalid_api_key", 429: "busy"}.get(error.status_code)
        return error.status_code, problem(error.status_code, str(error.detail), None, code)
    if isinstance(error, RecordError):
        return 400, problem(400, str(error), "documents")
    if isinstance(error, ReadOnly):
        return 403, problem(403, str(error), None, "read_only")
    if isinstance(error, EngineError):
        return 503, problem(503, str(error), None, "engine_error")
    if isinstance(error, TimeoutError):
        return 504, problem(504, "this took longer than the server allows (--request_timeout)", None, "timeout")
    if isinstance(error, OSError):
        return 507, problem(507, str(error), None, "storage")
    return 500, problem(500, "the server failed; its log says why")


def answer_errors(app: FastAPI) -> None:
    """Makes an app answer every error as `told` says."""

    def answer(request: Request, error: Any) -> Response:
        status, body = told(error)
        headers = dict(getattr(error, "headers", None) or {})
        if status in (429, 503):
            headers.setdefault("Retry-After", str(BUSY_SECONDS))
        return said(body, status, headers)

    for kind in (HTTPException, AnyHTTPException, BadRequest, RecordError, ReadOnly, EngineError, OSError, Exception):
        app.add_exception_handler(kind, answer)
