"""Which network card a host takes whose own name leads back to itself."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from embsearch_dist.errors import UserError
from embsearch_dist.ranks import addresses
from embsearch_dist.ranks.addresses import VARIABLE, all_loopback, cards, choose, default_card


def test_only_a_name_that_leads_to_the_host_itself_is_no_use() -> None:
    assert all_loopback({"127.0.1.1"}) and all_loopback({"127.0.0.1", "::1"})
    assert not all_loopback({"127.0.1.1", "10.0.0.4"}) and not all_loopback(set())


def test_a_name_that_others_can_use_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "addresses_of", lambda name: {"10.0.0.4"})
    assert addresses.card_for("first") == ""


def test_the_card_that_leads_to_the_first_host_comes_before_that_of_the_default_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses, "_leads", lambda own, other: own == "10.0.0.4" and other == "10.0.0.1")
    both = {"eth0": "192.0.2.7", "ib0": "10.0.0.4"}
    assert choose(both, {"10.0.0.1"}, "eth0", "me") == "ib0"
    # The first host knows itself as 127.0.1.1 and cannot ask which card leads to it.
    assert choose(both, {"127.0.1.1"}, "eth0", "me") == "eth0"


def test_the_only_card_is_taken_and_a_choice_between_two_is_the_users() -> None:
    assert choose({"ib0": "10.0.0.4"}, {"127.0.1.1"}, "", "me") == "ib0"
    assert choose({}, {"127.0.1.1"}, "", "me") == ""
    with pytest.raises(UserError, match=f"network cards eth0, ib0.*export {VARIABLE}=eth0"):
        choose({"ib0": "10.0.0.4", "eth0": "192.0.2.7"}, set(), "", "me")


def test_the_cards_of_this_machine_are_read_without_loopback() -> None:
    names = {name for _, name in socket.if_nameindex()}
    assert set(cards()) <= names and not any(a.startswith("127.") for a in cards().values())


def test_the_default_route_is_read(tmp_path: Path) -> None:
    table = "Iface\tDestination\tGateway\nib0\t000200C0\t00000000\neth0\t00000000\t010200C0\n"
    (tmp_path / "route").write_text(table)
    assert default_card(tmp_path / "route") == "eth0"
    (tmp_path / "route").write_text("Iface\tDestination\tGateway\n")
    assert default_card(tmp_path / "route") == "" == default_card(tmp_path / "none")
