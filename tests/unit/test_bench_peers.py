"""The benchmark beside published code, with a stand-in for that code: both sides train, and each has a line."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.factories import one_rank
from tools.bench import peers
from tools.bench.steps import BATCHES, cardinalities

SIZES = ["--table-rows", "2000", "--batch", "32", "--hidden", "8", "--rounds", "2", "--steps", "2", "--width", "4"]
OPTEMBED = """
import torch
from models.layer import Score

class DeepFM_super(torch.nn.Module):
    def __init__(self, opt):
        super().__init__()
        self.table = torch.nn.Embedding(sum(opt["field_dim"]), opt["latent_dim"])
        self.threshold = torch.nn.Parameter(torch.zeros(len(opt["field_dim"]), 1))
        self.norm, self.score, self.phases, self.seen = torch.nn.BatchNorm1d(2), Score(), [], []

    def forward(self, x, phase="test"):
        self.phases.append(phase)
        self.seen.append(x)
        return self.score(self.table(x))
"""
EVOLUTION = """
import torch

class DeepFM_evo(torch.nn.Module):
    def __init__(self, opt):
        super().__init__()
        self.table = torch.nn.Embedding(sum(opt["field_dim"]), opt["latent_dim"])
        self.ready = False

    def prepare_sparse_feature(self):
        self.ready = True

    def forward(self, x, cand):
        assert self.ready and cand.shape == x.shape[1:]
        return self.table(x).sum((1, 2))
"""
LAYER = """
import torch

class Score(torch.nn.Module):
    def forward(self, x):
        return x.sum((1, 2))
"""


def stand_in(folder: Path) -> Path:
    (folder / "models").mkdir()
    (folder / "models" / "modules_super.py").write_text(OPTEMBED)
    (folder / "models" / "layer.py").write_text(LAYER)
    return folder


def test_both_sides_have_a_line_and_a_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "start", lambda *sections: nullcontext(one_rank()))  # this process may have a group
    peers.main([*SIZES, "--optembed", str(stand_in(tmp_path))])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [cells[0] for cells in rows[2:]] == ["optembed, ours", "optembed, published"]
    assert float(rows[2][1].split(" ")[0].replace(",", "")) > 0 and rows[3][2].startswith("1.00 ")


def test_candidates_of_the_evolution_have_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "start", lambda *sections: nullcontext(one_rank()))
    (stand_in(tmp_path) / "models" / "modules_evo.py").write_text(EVOLUTION)
    peers.main([*SIZES, "--optembed", str(tmp_path), "--evolution"])
    told = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("| ")]
    assert [cells[0] for cells in rows[2:]] == ["optembed, ours", "optembed, published"]
    assert rows[0][1] == "candidates/s" and f"{32 * BATCHES} held-out rows" in told
    with pytest.raises(SystemExit, match="--evolution is OptEmbed's"):
        peers.main([*SIZES, "--optfs", str(tmp_path), "--evolution"])


def test_their_model_trains_on_the_ids_of_one_table_without_its_norm(tmp_path: Path) -> None:
    args = peers.argparse.Namespace(table_rows=2000, batch=32, width=4, hidden=[8], steps=2)
    side = peers.Theirs("optembed", stand_in(tmp_path), args)
    before = side.model.table.weight.detach().clone()
    assert side.step() > 0
    assert not torch.equal(before, side.model.table.weight) and side.model.phases == ["train"]
    assert float(side.model.threshold.detach().min()) > 0, "exp(-t) pushes the thresholds up"
    ids, first = side.model.seen[0], torch.tensor([0, *cardinalities(2000)]).cumsum(0)
    assert bool(((ids >= first[:-1]) & (ids < first[1:])).all()), "each field has rows of its own"
    assert isinstance(side.model.norm, torch.nn.Identity)
    assert not any(name.split(".")[0] == "models" for name in sys.modules), "their packages are gone again"


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([], "--optembed FOLDER, --optfs FOLDER or both"),
        (["--optfs", str(tmp_path)], "modules/mask.py does not exist"),
    ):
        with pytest.raises(SystemExit, match=message):
            peers.main([*SIZES, *words])
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "modules_super.py").write_text("import no_such_module")
    with pytest.raises(SystemExit, match="cannot be imported .*no_such_module"):
        peers.main([*SIZES, "--optembed", str(tmp_path)])
