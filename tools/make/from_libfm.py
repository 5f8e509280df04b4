"""Make a table of public data that are there as libFM files: lines of ``LABEL INDEX:1 INDEX:1 ...``, a value per field.

    python tools/make/from_libfm.py --input frappe.train.libfm frappe.validation.libfm frappe.test.libfm \\
        --fields user item daytime weekday isweekend homework cost weather country city --out runs/frappe_raw
    python launch/prepare.py --format table --input runs/frappe_raw/source.yaml --out runs/data/frappe --min-count 2

A label above 0 is a click. Field k is what stands k-th in a line; every line has all fields. Files are read one behind
the other, and prepare.py splits their rows anew. Leaves OUT/rows.csv and OUT/source.yaml, which appears last.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from embsearch_dist.errors import UserError

LABEL, ROWS, SOURCE = "label", "rows.csv", "source.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="libFM files, in this order")
    parser.add_argument("--fields", nargs="+", required=True, help="their names, in the order of a line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="libfm", help="of the data set in reports")
    args = parser.parse_args(argv)
    try:
        count = convert(args.input, args.fields, args.out, args.name)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"{count:,} rows -> {args.out / SOURCE}")
    return 0


def convert(files: Sequence[Path], fields: Sequence[str], out: Path, name: str) -> int:
    """Write the table and its source file; returns the rows.

    Raises:
        UserError: a file cannot be read, or a line is not of the form; names the file and the line.
    """
    if LABEL in fields or len(set(fields)) < len(fields):
        raise UserError(f"--fields: give each field a name of its own, other than {LABEL}")
    out.mkdir(parents=True, exist_ok=True)
    (out / SOURCE).unlink(missing_ok=True)  # of an earlier call: it would name rows that are not all there
    count = 0
    with (out / ROWS).open("w", newline="") as file, tqdm(unit=" rows", disable=not sys.stderr.isatty()) as bar:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([LABEL, *fields])
        for path in files:
            for row in rows_of(path, len(fields)):
                writer.writerow(row)
                bar.update()
                count += 1
    if not count:
        raise UserError(f"--input {files[0]}: no rows")
    kinds = dict.fromkeys(fields, "categorical")
    body = {"name": name, "files": [ROWS], "label": LABEL, "fields": kinds}
    (out / SOURCE).write_text(yaml.safe_dump(body, sort_keys=False))
    return count


def rows_of(path: Path, fields: int) -> Iterator[list[str]]:
    """The click (``0`` or ``1``) and the indices of each line that is not empty."""
    try:
        with path.open(encoding="ascii") as file:
            for number, line in enumerate(file, 1):
                if words := line.split():
                    yield row_of(words, fields, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--input {path}: cannot be read as text: {e}") from e


def row_of(words: Sequence[str], fields: int, where: str) -> list[str]:
    if len(words) != fields + 1:
        raise UserError(f"{where}: {len(words) - 1} values, and --fields names {fields}")
    try:
        label = float(words[0])
        if math.isnan(label):  # not above 0, and no answer either
            raise ValueError
    except ValueError as e:
        raise UserError(f"{where}: the label {words[0]!r} is no number") from e
    indices = []
    for word in words[1:]:
        index, colon, value = word.partition(":")
        if not colon or not (index.isascii() and index.isdigit()) or value not in ("1", "1.0"):
            raise UserError(
                f"{where}: {word!r} is not INDEX:1; other values of a feature have no place in a table of ids"
            )
        indices.append(index)
    return [str(int(label > 0)), *indices]


if __name__ == "__main__":
    sys.exit(main())
