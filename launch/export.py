"""Turn a trained model into a directory that stands alone: weights, vocabulary, how rows are read, programs, a card.

    python launch/export.py --run runs/my/retrain/adass --out exported/my
    python launch/export.py --run runs/my --out exported/my     the model that retrain.py chose there (method auto)
    python launch/export.py --run runs/my/retrain/adass --out exported/my --precision int8 --format onnx
    python launch/export.py --run runs/my/retrain/adass --out exported/my --format torch onnx triton
    python launch/export.py --run runs/my/retrain/ihas --out exported/ihas --router fields
    python launch/export.py --run runs/my/retrain/adafs --out exported/adafs

Options: --run DIR (what retrain.py, or a search that needs no retraining, has left; or a run directory with a choice
of retrain.py), --out DIR, --precision
fp32|fp16|int8|int4 of the embedding tables (default fp32; mixed: what a search with search.precision mixed chose for
each field), --format torch onnx aoti triton (programs beside the directory's own arrays; default none), --name NAME
(default: that of the run), --router centres|fields of models of groups, --source FILE (the YAML source file, or criteo,
where the data were prepared by an older version), --overwrite (replace a model directory), --section.key VALUE. One
process; the test split is read to measure what comes out.
docs/serving.md says what the directory holds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.ranks.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from embsearch_dist.config.options import one_of
from embsearch_dist.config.read import split_arguments
from embsearch_dist.errors import UserError
from embsearch_dist.precision import MIXED, PRECISIONS
from embsearch_dist.rundir import plain_word
from launch.common import chosen_model, known_options, run_main, take_words

OPTIONS = ("run", "out", "precision", "format", "name", "router", "source", "overwrite")


def main(argv: Sequence[str]) -> None:
    rest, words = take_words(argv, "--format")
    plain, overrides = split_arguments(rest)
    known_options(plain, OPTIONS, overrides)
    for name in ("run", "out"):
        if not plain.get(name):
            raise UserError(f"--{name} is missing. See --help")
    from embsearch_dist.serving import programs  # torch: not needed for what is refused above
    from embsearch_dist.serving.collect import ROUTERS, kind_of
    from embsearch_dist.serving.export import Wish, export, summary
    from embsearch_dist.serving.trained import trained

    formats = list(dict.fromkeys(words))
    if "--format" in argv and not formats:
        raise UserError(f"--format needs a word: {', '.join(programs.FORMATS)}")
    directory, router = chosen_model(Path(plain["run"])), plain.get("router", ROUTERS[0])
    precision = plain.get("precision", PRECISIONS[0])
    one_of("--precision", precision, (*PRECISIONS, MIXED))
    one_of("--router", router, ROUTERS)
    for word in formats:
        one_of("--format", word, programs.FORMATS)
    kind = kind_of(directory, overrides)
    if "router" in plain and kind != "routed":
        raise UserError(f"--router {router}: {directory} holds one model, not models of groups. Leave it out")
    name = plain_word(plain.get("name", directory.name), "--name")
    wish = Wish(Path(plain["out"]), precision, formats, "overwrite" in plain, name)
    with trained(directory, kind, router, overrides, plain.get("source", "")) as (run, found, stream):
        body = export(wish, found, Path(run.config.data.path), run.schema, stream, tell=_tell)
        print(summary(body, wish.out))


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_main(main, __doc__)
