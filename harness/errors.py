"""Errors that the user can fix."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix; the message says what was wrong, where, and what to do."""


class LostProcess(UserError):
    """Another process of a run that several share has ended before its time."""
