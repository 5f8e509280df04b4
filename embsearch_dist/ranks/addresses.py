"""The network card by which ranks of several hosts meet, where a host's own name leads back to itself.

Gloo offers the other ranks the address of the host's name. On Debian that is 127.0.1.1 by default, which on every other
host is that host itself: all would wait for each other until ``dist.wait_s``.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from embsearch_dist.errors import UserError

VARIABLE = "GLOO_SOCKET_IFNAME"
ROUTES = Path("/proc/net/route")
_ADDRESS_OF = 0x8915  # SIOCGIFADDR


def card_for(master: str) -> str:
    """What ``GLOO_SOCKET_IFNAME`` has to be on this host; empty where the host's name says it already.

    Args:
        master: name or address of the first host.

    Raises:
        UserError: the name is no use, and several cards could be the right one.
    """
    if not all_loopback(addresses_of(socket.gethostname())):
        return ""
    return choose(cards(), addresses_of(master), default_card(), socket.gethostname())


def choose(cards: Mapping[str, str], master: set[str], default: str, host: str) -> str:
    """The card of this host that the others reach.

    Args:
        cards: name -> IPv4 address, without loopback.
        master: addresses of the first host, as this one knows them.
        default: card of the default route; empty: there is none.
        host: this host's name.
    """
    towards = {c for c in cards if any(_leads(cards[c], a) for a in master if not a.startswith("127."))}
    for found in (towards, {default} & cards.keys(), set(cards)):
        if len(found) == 1:
            return found.pop()
    if not cards:
        return ""
    raise UserError(
        f"this host's name, {host}, leads to 127.0.1.1, which no other host can reach, and it has the network cards "
        f"{', '.join(sorted(cards))}. Say which one is for the job: export {VARIABLE}={min(cards)}, or give the name "
        "its address in /etc/hosts"
    )


def all_loopback(addresses: set[str]) -> bool:
    """Whether these addresses are those of a name that leads a host to itself."""
    return bool(addresses) and all(a.startswith("127.") or a == "::1" for a in addresses)


def addresses_of(name: str) -> set[str]:
    """Addresses of a name; empty where nobody knows it."""
    with contextlib.suppress(OSError):
        return {str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    return set()


def cards() -> dict[str, str]:
    """Network card -> its IPv4 address, without loopback and without cards that have none."""
    try:
        import fcntl
    except ImportError:  # Windows
        return {}
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                told = fcntl.ioctl(asking.fileno(), _ADDRESS_OF, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(told[20:24])
    return {name: address for name, address in found.items() if not address.startswith("127.")}


def default_card(routes: Path = ROUTES) -> str:
    """Card of the default route; empty where there is none, or no Linux."""
    try:
        lines = [line.split() for line in routes.read_text().splitlines()[1:]]
    except OSError:
        return ""
    return next((words[0] for words in lines if len(words) > 1 and words[1] == "00000000"), "")


def _leads(own: str, other: str) -> bool:
    """Whether packets to ``other`` leave by the card with the address ``own``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, contextlib.suppress(OSError):
        asking.connect((other, 9))  # nothing is sent
        return asking.getsockname()[0] == own
    return False
