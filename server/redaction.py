"""Log lines without secrets: keys of ours, Authorization values, and keys in URLs."""

from __future__ import annotations

import logging
import re

SECRETS = re.compile(
    r"(?P<kept>"
    r"\b(?:proxy-)?authorization['\"]?\)?\s*[:=,]\s*(?:b(?=['\"]))?['\"]?(?:(?:bearer|basic)\s+)?"
    r"|\bbearer\s+"
    r"|\bx-api-key['\"]?\s*[:=,]\s*(?:b(?=['\"]))?['\"]?"
    r"|[?&](?:api[-_]?key|key|token|access_token)="
    r"|://[^\s/:@]*:(?=[^\s/@]*@)"
    r"|\barl-(?=[A-Za-z0-9_-]{4})"
    r"|\bsk-(?=[A-Za-z0-9_-]{8})"
    r")(?P<secret>[^\s'\",&@]+)",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Secrets become `***`; what shows where they stood remains."""
    return SECRETS.sub(r"\g<kept>***", text)


class Redacting(logging.Formatter):
    """Formats a record, its stack trace included, and redacts all of it."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
