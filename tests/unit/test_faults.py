"""The fault injector: a rule strikes where it says and as often as it says, and a mistake in it is told."""

from __future__ import annotations

import contextlib
import errno
import signal

import pytest
import torch

from embsearch_dist.errors import UserError
from embsearch_dist.train.faults import Faults, Rule, from_environment, parse


def test_nothing_is_there_when_nothing_is_ordered() -> None:
    assert from_environment(0, "fit", {}) is None
    assert from_environment(0, "fit", {"EMBSEARCH_FAULTS": " "}) is None


def test_a_text_becomes_rules() -> None:
    found = parse("kill rank=1 step=30 stage=supernet; nan step=12 ;raise save=data error=ENOSPC times=3;")
    assert found == [
        Rule("kill", rank=1, step=30, stage="supernet"),
        Rule("nan", step=12),
        Rule("raise", save="data", error="ENOSPC", times=3),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kil step=3", r"unknown action 'kil' in 'kil step=3' \(did you mean 'kill'\?\)"),
        ("kill stop=3", r"unknown key 'stop'.*did you mean 'step'"),
        ("kill step", "'step' in 'kill step' has no value; write step=VALUE"),
        ("kill step=soon", "'step=soon' in 'kill step=soon' is not a number"),
        ("kill step=\u00b2", "'step=\u00b2' in 'kill step=\u00b2' is not a number"),
        ("kill save=manifesto", r"unknown point of a save 'manifesto'.*did you mean 'manifest'"),
        ("nan save=data", "a save has no loss"),
        ("nan at=head", "unknown place 'head'"),
        ("kill attempt=first", "'attempt=first' in 'kill attempt=first' is not a number"),
        ("raise error=EFULL", "'EFULL' in 'raise error=EFULL' is no errno"),
    ],
)
def test_a_mistake_in_a_rule_is_told(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"EMBSEARCH_FAULTS: .*{message}"):
        from_environment(0, "fit", {"EMBSEARCH_FAULTS": text})


def test_a_rule_strikes_at_its_rank_stage_and_step_once() -> None:
    text = "raise rank=1 step=4 stage=fit"
    for rank, stage, step in ((0, "fit", 4), (1, "other", 4), (1, "fit", 3)):
        Faults(parse(text), rank, stage).at_step(step)
    faults = Faults(parse(text), 1, "fit")
    faults.in_save("data", 4)  # a rule without save= is for steps
    with pytest.raises(RuntimeError, match="injected by EMBSEARCH_FAULTS"):
        faults.at_step(4)
    faults.at_step(4)


def test_a_rule_may_be_for_one_start_of_the_ranks() -> None:
    """A step that is done again after a restart of torchrun's must not be hit again."""
    text = "raise step=4 attempt=1"
    for restarts, strikes in ((None, False), ("0", False), ("1", True), ("2", False)):
        started = {} if restarts is None else {"TORCHELASTIC_RESTART_COUNT": restarts}
        faults = from_environment(0, "fit", {"EMBSEARCH_FAULTS": text} | started)
        assert faults is not None
        with pytest.raises(RuntimeError) if strikes else contextlib.nullcontext():
            faults.at_step(4)


def test_a_rule_for_a_save_strikes_at_its_point_so_often() -> None:
    faults = Faults(parse("raise save=state error=ENOSPC times=2"), 0, "fit")
    faults.at_step(3)
    faults.in_save("data", 3)
    for step in (3, 6):
        with pytest.raises(OSError) as caught:
            faults.in_save("state", step)
        assert caught.value.errno == errno.ENOSPC
    faults.in_save("state", 9)


def test_a_loss_is_spoiled_forwards_or_backwards() -> None:
    faults = Faults(parse("nan step=1; inf step=2; nan step=3 at=gradient"), 0, "fit")
    weight = torch.ones(2, requires_grad=True)
    assert [float(faults.loss(weight.sum(), step).detach()) for step in (0, 1, 2)] == pytest.approx(
        [2.0, float("nan"), float("inf")], nan_ok=True
    )
    loss = faults.loss(weight.sum(), 3)
    assert float(loss) == 2.0
    loss.backward()
    assert weight.grad is not None and bool(weight.grad.isnan().all())


def test_a_signal_is_sent_to_the_process_itself() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    try:
        Faults(parse("usr1 step=2"), 0, "fit").at_step(2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert caught == [signal.SIGUSR1]
