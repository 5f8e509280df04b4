"""Check 1: what is installed fits together, and FBGEMM's kernels run on this device."""

from __future__ import annotations

import time

import torch
from torchrec import KeyedJaggedTensor

from embsearch_dist import doctor as project_doctor
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.sharding.tables import Table
from tools.gpucheck.lab import Lab

NEEDED = ("pairing", "fbgemm", "operator")


def doctor_checks(lab: Lab) -> None:
    """The project's doctor; only what a training cannot do without fails this check."""
    found = project_doctor.examine(quick=True)
    if lab.kind != "pretend":  # it starts a process of its own, which would look for a real GPU
        found.append(project_doctor.check_operator(project_doctor.installed_versions()))
    for check in found:
        if check.status != project_doctor.OK:
            lab.note(**{check.name: f"{check.status}: {check.detail}"})
    broken = [c for c in found if c.status == project_doctor.FAIL and c.name in NEEDED]
    if broken:
        lab.expect(False, f"{broken[0].name}: {broken[0].detail}; " + "; ".join(broken[0].fix))


def look_up(lab: Lab) -> None:
    """One look-up and its SGD update, both known beforehand."""
    with lab.opened() as context:
        config = lab.config("optim.embedding=sgd", "optim.embedding_lr=1.0")
        tables = ShardedTables([Table("t", 4, 8)], context, config.dist, config.optim, 0, 0.0)
        (shard,) = tables.local_shards()
        shard.tensor.fill_(1.0)
        ids, lengths = torch.tensor([2, 2, 3], dtype=torch.int32), torch.tensor([2, 1, 0], dtype=torch.int32)
        pooled = tables(KeyedJaggedTensor(["t"], ids, lengths=lengths).to(lab.device)).values()
        lab.expect(pooled.device.type == lab.where, f"the look-up's result is on {pooled.device}")
        sums = pooled.sum(1).tolist()
        lab.expect(sums == [16.0, 8.0, 0.0], f"bags of 2, 1 and 0 rows of ones, 8 wide, add up to {sums}")
        pooled.sum().backward()
        tables.step()
        rows = shard.tensor.sum(1).tolist()
        lab.expect(rows == [8.0, 8.0, -8.0, 0.0], f"after SGD with rate 1 the rows add up to {rows}")


def doctor(lab: Lab) -> None:
    """Numbers first: they are worth most if the time ends early."""
    begun = time.monotonic()
    if lab.real:
        _card(lab)
    look_up(lab)
    lab.note(look_up_s=time.monotonic() - begun)
    doctor_checks(lab)


def _card(lab: Lab) -> None:
    properties = torch.cuda.get_device_properties(0)
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    lab.note(card=properties.name, memory_GiB=properties.total_memory / 2**30, capability=capability)
    lab.note(cuda=torch.version.cuda, built_for=" ".join(torch.cuda.get_arch_list()))
