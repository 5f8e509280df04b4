"""The fifteen checks in their order of value: what each does, where it is, and its share of the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: for --only, and in every line.
        place: ``module:function`` below this package; the function takes a :class:`tools.gpucheck.lab.Lab`.
        weight: of its share of the time that is left.
        text: what it does, in a line.
        least: seconds below which it is not begun on a GPU.
    """

    name: str
    place: str
    weight: float
    text: str
    least: float = 5.0


CHECKS = (
    Check(
        "doctor",
        "install:doctor",
        2,
        "versions fit each other; a look-up and its fused update run and are right",
        60.0,  # the first to read the libraries from the disk
    ),
    Check(
        "tbe",
        "lookups:against_torch",
        2,
        "look-up and all four optimizers against plain torch: widths 4 to 1024, lists",
    ),
    Check("resume", "chains:resume", 1.5, "Adam and Adagrad, stopped and continued, against the unbroken training"),
    Check(
        "evaluate",
        "chains:evaluate",
        3,
        "search, retrain, evaluate; the same AUC on the CPU; the tests of tests/gpu",
        110.0,  # the tests go through the chain twice more
    ),
    Check("methods", "chains:methods", 2, "20 steps of iHAS, NASRec and AdaFS, and what their searches leave"),
    Check("agreement", "agreement:devices", 2, "forward and backward on the device and on the CPU give the same"),
    Check("syncs", "traffic:syncs", 1.5, "how often a training step waits for the device, by file and line"),
    Check("roofline", "speed:roofline", 3, "rows/s on 26 tables of Criteo's sizes, and bytes/s beside a plain copy"),
    Check("peer", "speed:peer", 2.5, "DeepFM in torch alone, as people write it, taking turns with ours"),
    Check("supernet", "speed:supernet", 2, "a step of the AdaS&S supernet beside one of a uniform model; column sums"),
    Check(
        "launches", "traffic:launches", 1.5, "kernels that a step of NASRec starts, for drawn networks and the whole"
    ),
    Check("scorer", "scoring:scorer", 1.5, "candidates/s of the AdaS&S search, and the share that metrics take"),
    Check("stall", "storing:stall", 1.5, "how long training stands still for a checkpoint, written at once or behind"),
    Check("loader", "storing:loader", 1.5, "training from files beside training on a batch that lies on the device"),
    Check("plan", "speed:plan", 1, "bytes and time that launch/plan.py predicts beside those measured"),
)
ONE_CARD = "One device was used: nothing here shows NCCL, sharding or exchange over several GPUs."


def number_of(check: Check) -> int:
    """The place of its name in the list, from 1 on; 0 for a check that is not there."""
    return next((k for k, c in enumerate(CHECKS, 1) if c.name == check.name), 0)


def selected(names: Sequence[str]) -> list[Check]:
    """The checks of those names in their order here; all if there are none."""
    return [c for c in CHECKS if not names or c.name in names]


def describe() -> str:
    """What --list prints."""
    return "\n".join(f"{number_of(c):>2}  {c.name:<10} {c.text}" for c in CHECKS)
