"""Errors that a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, where, and what to do."""
