"""Masks personal data: e-mail addresses, public IP addresses, telephone numbers.

Numbers are masked only where they can hardly be anything else: an IP address in private or reserved ranges stays, and
so does what is written like a version; a telephone number needs its country code, or the form in which North Americans
write theirs.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.filters import Applied, Batch

_EMAIL = re.compile(
    rb"[A-Za-z0-9_](?:[A-Za-z0-9._%+'&-]*[A-Za-z0-9_+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+"
    rb"(?P<top>[A-Za-z]{2,24}|[Xx][Nn]--[A-Za-z0-9-]+)(?![A-Za-z0-9-])"
)
# Ends of file names and of units of systemd, such as icon@2x.png and getty@tty1.service: no top-level domains.
_FILES = frozenset(
    b"avif bmp cfg conf css csv gif gz htm html ico ini jpeg jpg js json lock log mount pdf php png service slice "
    b"socket svg tar target timer txt webp xml yaml yml".split()
)
_VERSION = re.compile(
    rb"(?:[\w.+-]|(?<!/)/|[<>=~!^]=|[<>~^]|(?:version|ver|release|rel|rev|build|section|sec)[ :=#]*)\Z", re.I
)
_CONTEXT = 12  # bytes before a number that tell what it is
# Four numbers below 100 are a section or a version more often than an address, unless something near says so.
_ADDRESS_BEFORE = re.compile(rb"(?:\bip|ipv4|addr|address|host|from|server|inet|dns|ping|//|@|\[)[ :=]*\Z", re.I)
_PORT = re.compile(rb":\d")
# What is given out of IPv6 (IANA, global unicast address assignments), roughly; times look like addresses elsewhere.
_GIVEN_OUT = [
    ipaddress.IPv6Network(part)
    for part in ("2001::/16", "2002::/15", "2400::/11", "2600::/10", "2800::/12", "2a00::/11", "2c00::/12")
]
_AREA = re.compile(rb"[2-9](?!11)\d\d[2-9]\d{6}")  # North American numbering plan; 911 and its like are no areas
# Country calling codes (ITU-T E.164): those of one and of two digits; all others that are given out have three.
_CODES = frozenset(
    b"20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65 66 81 82 84 86 "
    b"90 91 92 93 94 95 98".split()
)
_LONG_CODES = re.compile(rb"2[1-69]\d|3[578]\d|42\d|5[09]\d|6[789]\d|80\d|85\d|87\d|88\d|9[679]\d")


@dataclass
class PrivacyRules:
    """What is masked, and by what. Texts are changed, none is dropped."""

    enabled: bool = True
    """Whether personal data is masked."""
    emails: bool = True
    """Mask e-mail addresses."""
    ip_addresses: bool = True
    """Mask IP addresses, version 4 and 6, that are reachable from everywhere."""
    phone_numbers: bool = True
    """Mask telephone numbers with a country code, such as +49 30 1234567, and North American ones."""
    email: str = "email@example.com"
    """What stands in place of an e-mail address; the default's domain is reserved for examples (RFC 2606)."""
    ipv4: str = "192.0.2.1"
    """What stands in place of an IPv4 address; the default is reserved for documentation (RFC 5737)."""
    ipv6: str = "2001:db8::1"
    """What stands in place of an IPv6 address; the default is reserved for documentation (RFC 3849)."""
    phone_number: str = "555-0100"
    """What stands in place of a telephone number; the default is reserved for fiction."""

    def validate(self) -> None:
        """Raise ValueError when there is nothing to do."""
        if self.enabled and not (self.emails or self.ip_addresses or self.phone_numbers):
            raise ValueError("emails, ip_addresses and phone_numbers are all false; set enabled to false instead")

    def apply(self, batch: Batch) -> Applied:
        """Mask the documents; counts what was masked by kind."""
        from pipelines import privacy_scan as scan
        from pipelines.words.columns import buffers

        masks = {
            scan.EMAIL: ("e-mail address", self.emails, _is_email, self.email),
            scan.IPV4: ("IP address", self.ip_addresses, _is_ipv4, self.ipv4),
            scan.IPV6: ("IP address", self.ip_addresses, _is_ipv6, self.ipv6),
            scan.INTERNATIONAL: ("telephone number", self.phone_numbers, _is_international, self.phone_number),
            scan.NORTH_AMERICAN: ("telephone number", self.phone_numbers, _is_north_american, self.phone_number),
        }
        column = batch.table["text"]
        data, offsets = buffers(column)
        raw = memoryview(data)
        spans = []
        for kind, document, start, stop in scan.candidates(column, tuple(k for k in masks if masks[k][1])).tolist():
            what, _, check, mask = masks[kind]
            before = bytes(raw[max(offsets[document], start - _CONTEXT) : start])
            after = bytes(raw[stop : min(offsets[document + 1], stop + 2)])
            found = bytes(raw[start:stop])
            span = check(found, before, after)
            if span is not None and (masked := mask.encode()) != found[slice(*span)]:
                spans.append((start + span[0], start + span[1], document, what, masked))
        if not spans:
            return Applied([])
        spans.sort(key=lambda span: (span[0], -span[1]))
        return _replace(raw, offsets, spans)


def _replace(raw: memoryview, offsets: np.ndarray, spans: list[tuple[int, int, int, str, bytes]]) -> Applied:
    """The column with the spans replaced; of those that overlap the first is, and of those the longest."""
    pieces: list[memoryview | bytes] = []
    lengths = np.diff(offsets)
    counts: dict[str, int] = {}
    at = int(offsets[0])
    for start, stop, document, what, mask in spans:
        if start < at:
            continue
        pieces += (raw[at:start], mask)
        at = stop
        lengths[document] += len(mask) - (stop - start)
        counts[f"privacy: {what}"] = counts.get(f"privacy: {what}", 0) + 1
    pieces.append(raw[at : offsets[-1]])
    ends = np.zeros(len(offsets), np.int64)
    np.cumsum(lengths, out=ends[1:])
    text = pa.LargeStringArray.from_buffers(len(lengths), pa.py_buffer(ends), pa.py_buffer(b"".join(pieces)))
    return Applied([], text, counts)


# Each takes a candidate, a few bytes before it and two after it, and returns which part of it is what it looks like.


def _is_email(found: bytes, before: bytes, after: bytes) -> tuple[int, int] | None:
    match = _EMAIL.search(found)
    if match is None or match["top"].lower() in _FILES:
        return None
    if match.end() == len(found) and after[:1] in (b"(", b"["):  # a product of matrices, a method of one of them
        return None
    return match.span()


def _is_ipv4(found: bytes, before: bytes, after: bytes) -> tuple[int, int] | None:
    if _VERSION.search(before):
        return None
    address = ipaddress.IPv4Address(found.decode())
    if max(address.packed) < 100 and not (_ADDRESS_BEFORE.search(before) or _PORT.match(after)):
        return None
    return (0, len(found)) if address.is_global and not address.is_multicast else None


def _is_ipv6(found: bytes, before: bytes, after: bytes) -> tuple[int, int] | None:
    try:
        address = ipaddress.IPv6Address(found.decode())
    except ValueError:
        return None
    return (0, len(found)) if address.is_global and any(address in part for part in _GIVEN_OUT) else None


def _is_international(found: bytes, before: bytes, after: bytes) -> tuple[int, int] | None:
    if before.endswith((b"+", b"-", b".")):
        return None
    digits = re.sub(rb"\D", b"", found)
    if digits.startswith(b"1"):
        valid = bool(_AREA.fullmatch(digits, 1))
    else:
        valid = digits.startswith(b"7") or digits[:2] in _CODES or bool(_LONG_CODES.match(digits))
        groups = re.findall(rb"\d+", found)
        # One long number may be a quantity; groups of one digit are a list, but for an area of one digit.
        valid &= len(groups) > 1 or len(digits) >= 10
        valid &= all(len(group) > 1 for group in groups[2:] if group != b"0") and len(groups) <= 7
    return (0, len(found)) if valid else None


def _is_north_american(found: bytes, before: bytes, after: bytes) -> tuple[int, int] | None:
    if before.endswith((b".", b"-", b"/", b"#", b"$", b"+", b"=")):
        return None
    digits = re.sub(rb"\D", b"", found)
    return (0, len(found)) if _AREA.fullmatch(digits[-10:]) else None
