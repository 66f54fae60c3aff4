"""Errors that cross the wire as types: a gRPC status with a `common.v1.ErrorDetail` beside it."""

from __future__ import annotations

from typing import Any

import grpc

from tidings.api.common.v1.error_pb2 import ErrorDetail, ErrorReason

METADATA_KEY = "tidings-error-bin"

# As the comments in common/v1/error.proto say.
STATUS: dict[int, grpc.StatusCode] = {
    ErrorReason.ERROR_REASON_BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.ERROR_REASON_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    ErrorReason.ERROR_REASON_NOT_A_MEMBER: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_NAME_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    ErrorReason.ERROR_REASON_VIRTUAL_HOSTS_DIFFER: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_STRATEGY_DIFFERS: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_PROTOCOL_DIFFERS: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_DATABASE_AWAY: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.ERROR_REASON_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.ERROR_REASON_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    ErrorReason.ERROR_REASON_DOMAIN_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    ErrorReason.ERROR_REASON_STALE_EPOCH: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_NOT_SERVING: grpc.StatusCode.UNAVAILABLE,
}


class TidingsError(Exception):
    """A refusal that the caller can act upon. Raised in handlers; `metadata` are particulars by name."""

    def __init__(self, reason: ErrorReason.ValueType, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = STATUS[reason]
        self.message = message
        self.metadata = metadata

    def trailing(self) -> tuple[tuple[str, bytes], ...]:
        """The trailing metadata that carries it."""
        detail = ErrorDetail(reason=self.reason, message=self.message, metadata=self.metadata)
        return ((METADATA_KEY, detail.SerializeToString()),)


def error_detail(error: Any) -> ErrorDetail | None:
    """What a failed call says about itself; None for errors that are no refusals."""
    for key, value in tuple(error.trailing_metadata() or ()):
        if key == METADATA_KEY:
            return ErrorDetail.FromString(value)
    return None


def reason(error: Any) -> int:
    """The reason of a failed call; UNSPECIFIED where there is none."""
    detail = error_detail(error)
    return detail.reason if detail is not None else ErrorReason.ERROR_REASON_UNSPECIFIED


def describe(error: Any) -> str:
    """A failed call for people."""
    detail = error_detail(error)
    if detail is not None:
        return detail.message
    return f"{error.code().name}: {error.details()}"
