"""The helper that the other distributed tests stand on: results, tracebacks, and no process left behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import NOT_CONNECTED, THREADS, run_ranks


def add_up(rank: int, world_size: int, scale: int) -> dict[str, int]:
    total = torch.tensor([rank + scale])
    dist.all_reduce(total)
    return {"rank": rank, "size": world_size, "sum": int(total), "threads": torch.get_num_threads()}


def loaded(rank: int, world_size: int) -> list[bool]:
    return [name in sys.modules for name in ("embsearch_dist.train.trainer", "launch.common", "polars")]


def fail_on_one(rank: int, world_size: int, folder: str) -> None:
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    dist.barrier()
    if rank == 1:
        raise ValueError("a mistake on rank 1")
    dist.barrier()  # rank 1 never comes


def hang_here(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(60)


def cut_off(rank: int, world_size: int, folder: str, times: int) -> int:
    tries = Path(folder, f"tries{rank}")
    done = len(tries.read_text()) if tries.exists() else 0
    tries.write_text("x" * (done + 1))
    if done < times:
        raise RuntimeError(f"{NOT_CONNECTED} with [pair.cc:553] Connection closed by peer [127.0.0.1]:3809")
    return done


def own_group(rank: int, world_size: int) -> int:
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    dist.destroy_process_group()
    return size


def test_results_come_back_in_rank_order(tmp_path: Path) -> None:
    for scale in (1, 2):  # a second call in the same folder must not meet the first one's rendezvous
        results = run_ranks(add_up, 3, tmp_path, scale)
        assert results == [{"rank": r, "size": 3, "sum": 3 + 3 * scale, "threads": THREADS} for r in range(3)]


def test_ranks_are_forks_of_a_server_that_has_all_loaded_but_what_starts_threads(tmp_path: Path) -> None:
    assert run_ranks(loaded, 1, tmp_path) == [[True, True, False]]


def test_a_failure_shows_its_traceback_and_ends_all(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="a mistake on rank 1") as caught:
        run_ranks(fail_on_one, 2, tmp_path, str(tmp_path))
    assert "in fail_on_one" in str(caught.value)
    assert time.monotonic() - begin < 30
    for rank in range(2):
        pid = int((tmp_path / f"pid{rank}").read_text())
        assert not Path(f"/proc/{pid}").exists()


def test_a_hang_is_cut_short_and_located(tmp_path: Path) -> None:
    run_ranks(add_up, 2, tmp_path, 1)  # the server has started
    with pytest.raises(AssertionError, match="not done in time") as caught:
        run_ranks(hang_here, 2, tmp_path, timeout=10)
    assert "in hang_here" in str(caught.value)


def test_a_handshake_that_was_cut_is_tried_once_more(tmp_path: Path) -> None:
    assert run_ranks(cut_off, 2, tmp_path, str(tmp_path), 1) == [1, 1]


def test_a_handshake_that_is_cut_again_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=NOT_CONNECTED):
        run_ranks(cut_off, 2, tmp_path, str(tmp_path), 2)


def test_code_may_open_its_own_group(tmp_path: Path) -> None:
    assert run_ranks(own_group, 2, tmp_path, init=False) == [2, 2]
