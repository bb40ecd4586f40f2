"""Whose request it is: every file belongs to a tenant, and another tenant's file does not exist for the caller."""

from __future__ import annotations

from starlette.requests import Request

DEFAULT_TENANT = "default"


def tenant_of(request: Request | None) -> str:
    """The caller's tenant; `default` where keys do not tell callers apart, and for requests without HTTP behind."""
    return DEFAULT_TENANT
