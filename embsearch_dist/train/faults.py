"""Injected faults, for the tests: a rank that dies, a NaN, a full disk, at a step or inside a save.

Off unless the environment variable ``EMBSEARCH_FAULTS`` is set; a training without it holds ``None`` where
the faults would be. The variable is a list of rules, separated by ``;``::

    kill rank=1 step=30 stage=supernet      SIGKILL to itself when 30 steps are done
    kill save=manifest step=24              ... inside the save of step 24, once the manifest is written
    nan rank=0 step=12                      the loss of the step that follows 12 done ones is NaN (inf: infinite)
    nan at=gradient step=12                 the loss is fine, what comes back from it is NaN
    term step=7 (usr1, int)                 the signal that a scheduler sends
    raise step=3 error=ENOSPC save=data     an OSError with that errno; without ``error`` a RuntimeError
    kill rank=1 step=5 attempt=0            only in the first start of the ranks, not in those of --max-restarts

``rank``, ``stage``, ``step`` and ``attempt`` left out mean any. A rule fires once in each process, ``times=N`` N
times. Ranks that torchrun starts again are new processes, and may do the same step again.
"""

from __future__ import annotations

import errno
import operator
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from embsearch_dist.errors import UserError, nearest
from embsearch_dist.ranks.environment import attempt

VARIABLE = "EMBSEARCH_FAULTS"
# In the order a save passes them. `begin`: nothing written yet; the others: just after that was done.
SAVE_POINTS = ("begin", "data", "state", "manifest", "rename", "prune")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "int": signal.SIGINT}
ACTIONS = (*SIGNALS, "nan", "inf", "raise")
KEYS = ("rank", "step", "stage", "save", "at", "error", "times", "attempt")
NUMBERS = ("rank", "step", "times", "attempt")
PLACES = ("loss", "gradient")


@dataclass
class Rule:
    """One fault: what happens, where, and how often it still may."""

    action: str
    rank: int | None = None
    step: int | None = None
    stage: str | None = None
    save: str | None = None
    at: str = "loss"
    error: str | None = None
    times: int = 1
    attempt: int | None = None

    def due(self, rank: int, stage: str, save: str | None, step: int) -> bool:
        """Whether it happens here and now; then one of its ``times`` is used up."""
        wanted = ((self.rank, rank), (self.stage, stage), (self.step, step))
        if self.times < 1 or self.save != save or any(want is not None and want != got for want, got in wanted):
            return False
        self.times -= 1
        return True

    def strike(self) -> None:
        if self.action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.action])
        elif self.error:
            number = getattr(errno, self.error)
            raise OSError(number, f"{os.strerror(number)} (injected)")
        else:
            raise RuntimeError(f"injected by {VARIABLE}")


class Faults:
    """The rules of one rank in one stage; asked at the steps and inside saves."""

    def __init__(self, rules: list[Rule], rank: int, stage: str) -> None:
        self.rules, self.rank, self.stage = rules, rank, stage

    def at_step(self, step: int) -> None:
        """Called when ``step`` steps are done, before the checkpoint of that step and before the next one."""
        self._strike(None, step)

    def in_save(self, point: str, step: int) -> None:
        """Called at each of ``SAVE_POINTS`` of the save of ``step``."""
        self._strike(point, step)

    def loss(self, loss: torch.Tensor, step: int) -> torch.Tensor:
        """The loss, or what the rules make of it."""
        for rule in self.rules:
            if rule.action in ("nan", "inf") and rule.due(self.rank, self.stage, None, step):
                value = float(rule.action)
                if rule.at == "loss":
                    loss = loss * value
                else:
                    loss.register_hook(partial(operator.mul, value))
        return loss

    def _strike(self, save: str | None, step: int) -> None:
        for rule in self.rules:
            if rule.action not in ("nan", "inf") and rule.due(self.rank, self.stage, save, step):
                rule.strike()


def from_environment(rank: int, stage: str, environment: Mapping[str, str] = os.environ) -> Faults | None:
    """The faults that are ordered; None when there are none, which is always but in tests.

    Raises:
        UserError: the variable holds something else than rules; it is the same on all ranks.
    """
    text = environment.get(VARIABLE, "")
    if not text.strip():
        return None
    now = attempt(environment)
    return Faults([rule for rule in parse(text) if rule.attempt in (None, now)], rank, stage)


def parse(text: str) -> list[Rule]:
    """The rules of a text like ``kill step=3; nan rank=1 step=5``."""
    return [_rule(part.split()) for part in text.split(";") if part.strip()]


def _rule(words: list[str]) -> Rule:
    action, whole = words[0], " ".join(words)
    _known(whole, "action", action, ACTIONS)
    rule = Rule(action)
    for word in words[1:]:
        key, equals, value = word.partition("=")
        _known(whole, "key", key, KEYS)
        if not equals or not value:
            raise UserError(f"{VARIABLE}: {word!r} in {whole!r} has no value; write {key}=VALUE")
        if key in NUMBERS:
            if not value.isdecimal():
                raise UserError(f"{VARIABLE}: {word!r} in {whole!r} is not a number >= 0; write e.g. {key}=3")
            setattr(rule, key, int(value))
        else:
            setattr(rule, key, value)
    if rule.save is not None:
        _known(whole, "point of a save", rule.save, SAVE_POINTS)
        if action in ("nan", "inf"):
            raise UserError(f"{VARIABLE}: {whole!r} makes no sense, a save has no loss; leave out save=")
    _known(whole, "place", rule.at, PLACES)
    if rule.error is not None and not hasattr(errno, rule.error):
        raise UserError(f"{VARIABLE}: {rule.error!r} in {whole!r} is no errno; write e.g. error=ENOSPC")
    return rule


def _known(whole: str, what: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        hint = nearest(word, known)
        raise UserError(f"{VARIABLE}: unknown {what} {word!r} in {whole!r}{hint}; known: {', '.join(known)}")
