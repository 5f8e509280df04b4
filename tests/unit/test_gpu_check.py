"""tools/gpu_check.py: whatever a check does, the others run and the table tells; and checks see wrong numbers."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.ranks.context import Context
from embsearch_dist.train.metrics import score
from tests.factories import one_rank
from tools.gpucheck import agreement, facts, lookups, scoring, speed, storing, traffic
from tools.gpucheck.command import main
from tools.gpucheck.lab import Lab
from tools.gpucheck.listing import CHECKS, ONE_CARD, Check
from tools.gpucheck.runner import run_checks, starter
from tools.gpucheck.table import markdown, text_table
from tools.gpucheck.worker import Skip, Wrong

ROOT = Path(__file__).resolve().parents[2]
WHERE = {"device": "none", "torch": "2", "commit": "abc"}


def fake(name: str, weight: float = 1.0, least: float = 1.0) -> Check:
    return Check(name, f"tests.gpu_checks:{name}", weight, "for the test", least)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_no_end_of_a_check_stops_the_next_one(tmp_path: Path) -> None:
    names = ["fine", "wrong", "broken", "leaves", "crashes", "skips"]
    checks = [*map(fake, names), fake("hangs", 1e-9, 6.0), fake("fine")]
    log = tmp_path / "log.txt"
    found = list(run_checks(checks, "cpu", 200, tmp_path / "work", None, WHERE, starter("cpu", log)))
    status = [r["status"] for r in found]
    assert status == ["ok", "FAILED", "FAILED", "FAILED", "FAILED", "skipped", "FAILED", "ok"]
    why = [r["why"] for r in found]
    assert why[1] == "auc: 0.75, should be 0.7 within 0.0001" and why[5] == "nothing to see"
    assert why[2].startswith("ZeroDivisionError: a bug of the check (gpu_checks.py:")
    assert "SystemExit" in why[3] and "SIGSEGV" in why[4] and why[6] == "not done after 6 s, stopped"
    # What was told before the end is kept.
    assert found[1]["figures"] == {"first": 1} and found[4]["figures"] == {"before": 2}
    assert found[0]["figures"] == {"answer": 42, "shown in two words": 0.5, "parts": {"a": 1}, "nothing": "nan"}
    assert not alive(found[6]["figures"]["child"])
    assert all(r["device"] == "none" and r["commit"] == "abc" for r in found)
    assert "ZeroDivisionError" in log.read_text() and (tmp_path / "work" / "fine" / "file").exists()


def test_processes_for_a_gpu_start_afresh_and_do_the_same(tmp_path: Path) -> None:
    (found,) = run_checks([fake("fine")], "cpu", 200, tmp_path, None, WHERE, starter("cuda", tmp_path / "log.txt"))
    assert found["status"] == "ok" and found["figures"]["answer"] == 42, found["why"]


def test_checks_that_no_longer_fit_are_left_out(tmp_path: Path) -> None:
    checks = [fake("fine", least=1000.0), fake("wrong", least=1000.0)]
    found = list(run_checks(checks, "cpu", 60, tmp_path, None, WHERE, starter("cpu", tmp_path / "log.txt")))
    assert [(r["status"], r["why"]) for r in found] == [("left out", "no time")] * 2


def test_the_command_leaves_lines_and_a_table_and_fails_if_a_check_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--out", str(tmp_path / "out"), "--budget", "100"]
    checks = [Check("tbe", "tests.gpu_checks:wrong", 1, ""), Check("plan", "tests.gpu_checks:fine", 1, "")]
    assert main(words, "", checks) == 1
    assert main(words, "", checks[1:]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["check"] for line in lines] == ["plan"]  # of the second run alone
    printed = capsys.readouterr().out
    assert "2 checks: 1 ok, 1 FAILED." in printed and ONE_CARD in printed
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| 15 | plan | ok |" in page and "answer 42; shown in two words 0.5; nothing nan |" in page
    assert f"`python3 tools/gpu_check.py {' '.join(words)}`" in page and "torch 2." in page


def test_tables_show_numbers_and_words_and_no_lists() -> None:
    figures = {"rows per s": 4_300_000.4, "share": 0.123456, "lines": {"a|b": 2}, "card": "A|B"}
    result = {"number": 8, "check": "roofline", "status": "FAILED", "seconds": 1.25, "why": "too slow"}
    text = text_table([result | {"figures": figures}])
    assert "too slow; rows per s 4,300,000; share 0.1235; card A|B" in text and "lines" not in text
    assert all(len(line) <= 120 for line in text.splitlines())
    page = markdown([result | {"figures": figures}], WHERE, "command")
    assert "| 8 | roofline | FAILED | 1.2 | too slow; rows per s 4,300,000; share 0.1235; card A\\|B |" in page
    assert "1 checks: 1 FAILED." in page and ONE_CARD in page


def test_the_list_names_fifteen_checks_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(CHECKS) == 15 and len({c.name for c in CHECKS}) == 15
    for check in CHECKS:
        module, _, name = check.place.partition(":")
        assert callable(getattr(importlib.import_module(f"tools.gpucheck.{module}"), name))
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 15


@pytest.mark.parametrize(
    "words",
    [["--device", "tpu"], ["--only", "rooflin"], ["--device", "cpu"], ["--budget", "0"], ["--data", "no-such-folder"]],
)
def test_a_wrong_command_line_is_told(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete = words if words == ["--device", "cpu"] else ["--device", "cpu", "--out", str(tmp_path), *words]
    with pytest.raises(SystemExit, match="2"):
        main(complete)
    assert "--" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_parent_process_loads_no_torch() -> None:
    code = "import sys, tools.gpucheck.command as c; c.main(['--list']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_the_commit_is_known_without_git(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    file = tmp_path / "tools" / "a.py"
    file.write_text("1")
    first = facts.commit(tmp_path)
    file.write_text("2")
    second = facts.commit(tmp_path)
    assert first.startswith("sources-") and second.startswith("sources-") and first != second
    file.write_text("1")
    assert facts.commit(tmp_path) == first


class OneRank(Lab):
    """On the CPU, in the process group that the tests share; keeps what it is told."""

    def __init__(self, folder: Path) -> None:
        self.found: dict[str, Any] = {}
        super().__init__("cpu", folder, None, time.monotonic() + 300, self.found.update)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Context]:
        yield one_rank()


def test_look_ups_that_forget_to_average_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = OneRank(tmp_path)
    assert lookups.compare(lab, one_rank(), "adagrad", weighted=False) < 1e-6
    monkeypatch.setattr("embsearch_dist.sharding.sharded_tables.divide_means", lambda pooled, *_: pooled)
    assert lookups.compare(lab, one_rank(), "adagrad", weighted=False) > 0.1


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad", "sgd"])
def test_the_reference_of_an_optimizer_follows_torch(optimizer: str) -> None:
    """All rows looked up, one each: then torch's dense optimizers do the same."""
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    weight = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    reference = lookups.Reference(optimizer, weight.detach().clone())
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    options = {} if optimizer == "sgd" else {"eps": 1e-8}
    torchs = kinds.get(optimizer, RowWiseAdagrad)([weight], lr=lookups.LR, **options)
    bags: lookups.Bags = [(torch.tensor([k]), None) for k in range(6)]
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        reference.update(bags, False, weight.grad)
        torchs.step()
    assert lookups.apart(reference.weight, weight.detach()) < 1e-7


def test_a_device_that_computes_another_gradient_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = OneRank(tmp_path)
    kept = {name: case for name, case in agreement.cases(lab).items() if name in ("deepfm", "supernet_field")}
    monkeypatch.setattr(agreement, "cases", lambda lab: kept)
    agreement.devices(lab)
    assert lab.found["deepfm"] == lab.found["supernet field"] == 0.0
    calls, honest = iter(range(100)), torch.nn.functional.batch_norm

    def drifting(*args: Any, **options: Any) -> torch.Tensor:
        return honest(*args, **options) * (1 + 0.01 * next(calls))

    monkeypatch.setattr(torch.nn.functional, "batch_norm", drifting)
    with pytest.raises(Wrong, match="device and CPU disagree: supernet_field"):
        agreement.devices(lab)


def test_waits_that_torch_warns_of_are_counted_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    # Other warnings are not counted, and a line of the project is named rather than that of who called it.
    monkeypatch.setattr("embsearch_dist.train.metrics.logloss", lambda *_: warnings.warn("hot", stacklevel=1) or 0.0)

    def synchronizing(*_: Any) -> float:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return 0.5

    lab = OneRank(tmp_path)
    with pytest.warns(UserWarning, match="hot"), traffic.counted_syncs(lab) as found:
        for _ in range(3):
            score(torch.randn(8), torch.ones(8), synchronizing)
        synchronizing()
    assert modes == ["warn", "default"]
    (inside, three), (outside, one) = found.syncs.most_common()
    assert (three, one) == (3, 1) and inside.startswith("embsearch_dist/train/metrics.py:")
    assert outside.startswith("test_gpu_check.py:")


def test_a_step_that_waits_too_often_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, seen = OneRank(tmp_path), traffic.Traffic()
    seen.syncs.update({"embsearch_dist/models/norm.py:47": 12})
    monkeypatch.setattr(traffic, "watched_steps", lambda *_: seen)
    monkeypatch.setattr(traffic, "tasks", lambda *_: [("retrain", None, None)])
    with pytest.raises(Skip):
        traffic.syncs(lab)
    lab.kind = "cuda"
    with pytest.raises(
        Wrong, match="retrain waits 3 times a step .at most 2., first at embsearch_dist/models/norm.py:47"
    ):
        traffic.syncs(lab)
    seen.syncs.clear()
    seen.syncs.update({"embsearch_dist/train/guard.py:125": 8})
    traffic.syncs(lab)
    assert lab.found["retrain"] == 2.0


def test_a_peer_that_is_another_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embsearch_dist.models.backbones.additive.fm", lambda u: 100 * u.sum((1, 2)))
    with pytest.raises(Wrong, match="bags: with our weights its logits are"):
        speed.peer(OneRank(tmp_path))


def test_a_scorer_with_another_auc_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = scoring.evaluate
    monkeypatch.setattr(scoring, "evaluate", lambda *a: {"auc": measured(*a)["auc"] + 0.01})
    with pytest.raises(Wrong, match="AUC of a candidate in float32"):
        scoring.scorer(OneRank(tmp_path))


def test_a_checkpoint_that_is_not_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embsearch_dist.train.checkpoint.Checkpointer.save", lambda *a, **k: None)
    with pytest.raises(Wrong, match="at_once: no whole checkpoint"):
        storing.stall(OneRank(tmp_path))
