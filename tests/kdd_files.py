"""Small files in the form of KDD Cup 2012 track 2, and what a reader in plain Python makes of them."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

IDS = ("display_url", "ad_id", "advertiser_id", "query_id", "keyword_id", "title_id", "description_id", "user_id")
NUMBERS = ("impression", "depth", "position")
USERS = 60


def write_kdd(folder: Path, rows: str, profiles: str = "7\t1\t3\n") -> Path:
    """Both files of the given text; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.txt").write_text(rows)
    (folder / "userid_profile.txt").write_text(profiles)
    return folder


def line(**cells: object) -> str:
    """A line of training.txt: no click, one impression, every id 7, but for ``cells``."""
    names = ("click", "impression", *IDS[:3], "depth", "position", *IDS[3:])
    usual = {"click": 0, "impression": 1, "depth": 2, "position": 1}
    return "\t".join(str(cells.get(name, usual.get(name, 7))) for name in names) + "\n"


def make_kdd(folder: Path, rows: int = 1000, seed: int = 0) -> Path:
    """``rows`` rows of few values; gives the folder.

    Of 60 users every fifth has no profile, and one row in ten has nobody (user 0). Hashes of addresses take all 64
    bits. A click is likely for odd advertisers, and for every one where the user's gender is 2.
    """
    rng = np.random.default_rng(seed)
    gender, age = rng.integers(0, 3, USERS + 1), rng.integers(1, 7, USERS + 1)
    order = rng.permutation(np.arange(1, USERS + 1))
    profiles = "".join(f"{u}\t{gender[u]}\t{age[u]}\n" for u in order if u % 5)
    lines = []
    for _ in range(rows):
        user = 0 if rng.random() < 0.1 else int(rng.integers(1, USERS + 1))
        advertiser = int(rng.integers(12))
        told = bool(user and user % 5 and gender[user] == 2)
        impressions = int(rng.geometric(0.7))
        cells = {
            "click": int(rng.binomial(impressions, 0.7 if advertiser % 2 or told else 0.1)),
            "impression": impressions,
            "display_url": 2**64 - 1 - int(rng.integers(9)) * 10**18,
            "ad_id": int(rng.integers(20)),
            "advertiser_id": advertiser,
            "depth": int(rng.integers(1, 4)),
            "position": int(rng.integers(1, 4)),
            **{name: int(rng.integers(30) ** 2) for name in IDS[3:7]},
            "user_id": user,
        }
        lines.append(line(**cells))
    return write_kdd(folder, "".join(lines), profiles)


def plain_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder as they should be read: label, texts (``None``: missing) and logarithms."""
    with (folder / "userid_profile.txt").open() as file:
        profiles = {user: (gender, age) for user, gender, age in csv.reader(file, delimiter="\t")}
    found: list[dict[str, Any]] = []
    for text in (folder / "training.txt").read_text().splitlines():
        click, impression, url, ad, advertiser, depth, position, query, keyword, title, description, user = text.split(
            "\t"
        )
        row: dict[str, Any] = dict(zip(IDS, (url, ad, advertiser, query, keyword, title, description, user)))
        gender, age = profiles.get(user, (None, None)) if user != "0" else (None, None)
        row |= {"label": float(int(click) > 0), "gender": gender, "age": age}
        row["user_id"] = None if user == "0" else user
        row |= {n: math.log(max(int(x), 0) + 1) for n, x in zip(NUMBERS, (impression, depth, position))}
        found.append(row)
    return found
