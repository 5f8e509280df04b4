"""The Dockerfile, read and not built: what it copies, installs and starts is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("cpu", "cuda")


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) in order; comments are left out and continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    return instructions((ROOT / "Dockerfile").read_text())


def of(steps: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for name, rest in steps if name == word]


def test_instructions_are_dockers(steps: list[tuple[str, str]]) -> None:
    assert {name for name, _ in steps} <= {"ARG", "FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}
    assert steps[0][0] == "ARG"  # before the first FROM: for the names of images


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_follow_from_public_images_and_earlier_stages(steps: list[tuple[str, str]], variant: str) -> None:
    given = dict(rest.split("=", 1) for rest in of(steps, "ARG") if "=" in rest) | {"VARIANT": variant}
    known: set[str] = set()
    for rest in of(steps, "FROM"):
        base, stage = re.sub(r"\$\{(\w+)\}", lambda m: given[m[1]], rest).split(" AS ")
        assert base in known or re.fullmatch(r"(python|nvidia/cuda):[\w.-]+", base), base
        known.add(stage)
    for rest in of(steps, "COPY"):
        found = re.match(r"--from=(\S+)", rest)
        assert not found or found[1] in known


def test_what_is_copied_exists_and_reaches_the_build(steps: list[tuple[str, str]]) -> None:
    sources = [word for rest in of(steps, "COPY") if not rest.startswith("--from") for word in rest.split()[:-1]]
    assert {"requirements/", "embsearch_dist/", "launch/", "configs/", "LICENSE"} <= set(sources)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored  # all is left out ...
    let_in = {line[1:].split("/")[0] for line in ignored if line.startswith("!")}
    for source in sources:
        assert (ROOT / source).exists()
        assert source.rstrip("/") in let_in  # ... but what is copied


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_installed_exists(steps: list[tuple[str, str]], variant: str) -> None:
    told = " ".join(of(steps, "RUN")).replace("${VARIANT}", variant)
    files = set(re.findall(r"requirements/[\w.-]+\.txt", told))
    assert files == {f"requirements/{name}.txt" for name in ("common", variant, "test")}
    assert all((ROOT / name).exists() for name in files)
    assert f'--no-deps -r "requirements/{variant}.txt"' in told  # or pip adds the other FBGEMM build
    for extra in re.findall(r"\[([\w,]+)\]\"", told)[0].split(","):
        assert f'"{extra}": [' in (ROOT / "setup.py").read_text()


def test_the_wheels_own_files_are_copied(steps: list[tuple[str, str]]) -> None:
    """setup.py reads the README, and packages the folders that it names."""
    sources = {word.rstrip("/") for rest in of(steps, "COPY") for word in rest.split()[:-1]}
    text = (ROOT / "setup.py").read_text()
    folders = {
        name.split(".")[0]
        for line in re.findall(r"include=\[([^\]]+)\]", text)
        for name in re.findall(r'"([^"]+)"', line)
    }
    assert folders == {"embsearch_dist", "launch", "configs"}
    assert folders | set(re.findall(r'license_files=\["(\w+)"\]', text)) | {"README.md"} <= sources


def test_it_starts_the_command_as_no_root(steps: list[tuple[str, str]]) -> None:
    last = max(number for number, (name, _) in enumerate(steps) if name == "FROM")
    names = [name for name, _ in steps[last:]]
    (user,), (entry,) = of(steps[last:], "USER"), of(steps[last:], "ENTRYPOINT")
    assert user.isdigit() and int(user) > 0 and f"--uid {user} " in " ".join(of(steps[last:], "RUN"))
    assert "RUN" not in names[names.index("USER") :]
    assert entry == '["embsearch"]' and "embsearch = launch.cli:main" in (ROOT / "setup.py").read_text()
