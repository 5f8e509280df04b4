"""MovieLens 1M and 100K: ratings joined with what is known of the user and the movie."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import polars as pl

from embsearch_dist.data.formats.blocks import Block, Layout, parse, read_blocks
from embsearch_dist.data.formats.columns import EVERYTHING, TIME, Bag, Chunk, Column, Reading, Rows, Source
from embsearch_dist.data.formats.unlabelled import check_kept, layout_of
from embsearch_dist.errors import UserError

LIKED_ABOVE = 3
BASE = ("user_id", "gender", "age", "occupation", "zip", "movie_id", "year", "genres")
TIMED = (*BASE, "weekday", "hour_in_day")
LARGEST_RATING = 10  # of any scale; as a time it would be of the first seconds of 1970
LATEST = 10**11  # in the year 5138; a time in milliseconds is later
STAMPS = "Give rows with user, movie and time stamp, as in the original ratings"
# One to six of eighteen: their mean is as large for a movie of many genres as for one of few.
GENRES = Bag(pooling="mean", separator="|")

RATINGS_1M = ("ratings.dat", "ratings_no_timestamp.dat.gz", "ratings_first_50440.dat")
GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)

YEAR = r"\((\d{4})\)\s*$"


def movielens_1m(path: Path, genres_as_list: bool = False, reading: Reading = EVERYTHING) -> Source:
    """MovieLens 1M: a directory with users.dat, movies.dat and ratings (or the ratings file itself).

    Fields: user_id, gender, age, occupation, zip, movie_id, year (of the title), genres (the whole
    string is one value, unless it is to be a list); where ratings carry a timestamp also weekday
    (``weekend`` or ``weekday``) and hour_in_day, both in UTC. Label: rating > 3.
    """
    ratings = path if path.is_file() else _first(path, RATINGS_1M)
    timed = not ratings.name.startswith("ratings_no_timestamp")
    names = ("user_id", "movie_id", "rating", *(("timestamp",) if timed else ()))
    users = _small(
        ratings.parent / "users.dat",
        Layout(("user_id", "gender", "age", "occupation", "zip"), "::", encoding="latin-1"),
    )
    movies = _small(
        ratings.parent / "movies.dat", Layout(("movie_id", "title", "genres"), "::", encoding="latin-1")
    ).select("movie_id", pl.col("title").str.extract(YEAR).alias("year"), "genres")
    layout = Layout(names, "::", encoding="latin-1")
    small = ("users.dat", "movies.dat")
    return _source("movielens_1m", ratings, layout, users, movies, small, genres_as_list, reading)


def movielens_100k(path: Path, genres_as_list: bool = False, reading: Reading = EVERYTHING) -> Source:
    """MovieLens 100K: a directory with u.data, u.user and u.item. Fields and label as for 1M, timed."""
    ratings = path if path.is_file() else _first(path, ("u.data",))
    users = _small(
        ratings.parent / "u.user",
        Layout(("user_id", "age", "gender", "occupation", "zip"), "|", encoding="latin-1"),
    )
    genres = tuple(f"genre {g}" for g in GENRES_100K)
    items = _small(
        ratings.parent / "u.item",
        Layout(("movie_id", "title", "release", "video", "url", *genres), "|", encoding="latin-1"),
    )
    flags = [pl.when(pl.col(g) == "1").then(pl.lit(g.removeprefix("genre "))) for g in genres]
    movies = items.select(
        "movie_id",
        pl.col("title").str.extract(YEAR).alias("year"),
        pl.concat_str(flags, separator="|", ignore_nulls=True).replace("", None).alias("genres"),
    )
    layout = Layout(("user_id", "movie_id", "rating", "timestamp"), "\t", encoding="latin-1")
    small = ("u.user", "u.item")
    return _source("movielens_100k", ratings, layout, users, movies, small, genres_as_list, reading)


def _source(
    dataset: str,
    ratings: Path,
    layout: Layout,
    users: pl.DataFrame,
    movies: pl.DataFrame,
    small: tuple[str, str],
    genres_as_list: bool,
    reading: Reading,
) -> Source:
    layout = layout if reading.labelled else layout_of(ratings, layout, "rating")
    check_kept(ratings, layout, reading)
    timed = "timestamp" in layout.columns
    if reading.only is not None:
        clock = [n for n in TIMED[len(BASE) :] if n in reading.only]
        if clock and not timed:
            raise UserError(f"{ratings}: no time stamps, of which {clock[0]} is made. {STAMPS}")
        timed = bool(clock)
    unrated = "rating" not in layout.columns
    lists = {"genres": Column("genres", "list", GENRES)} if genres_as_list else {}
    columns = tuple(lists.get(n, Column(n)) for n in (TIMED if timed else BASE))

    def read(block: Block) -> pl.DataFrame:
        rows = Rows(parse(block, layout), block.where)
        _known(rows, "user_id", users, small[0])
        _known(rows, "movie_id", movies, small[1])
        frame = rows.frame.join(users, on="user_id", how="left", maintain_order="left")
        frame = frame.join(movies, on="movie_id", how="left", maintain_order="left")
        if reading.labelled:
            frame = frame.with_columns(rows.label("rating", LIKED_ABOVE))
        if timed:
            seconds = rows.integer("timestamp")
            if unrated and (rated := seconds.is_between(1, LARGEST_RATING)).any():
                row = int(rated.arg_max() or 0)
                raise UserError(f"{rows.where(row)}: {seconds[row]} is a rating, no time stamp. {STAMPS}")
            if (odd := ~seconds.is_between(0, LATEST)).any():
                row = int(odd.arg_max() or 0)
                raise UserError(
                    f"{rows.where(row)}, column 'timestamp': {seconds[row]} is not in seconds since 1970. Write these"
                )
            frame = frame.with_columns(seconds.alias("timestamp"), seconds.cast(pl.Float64).alias(TIME))
            moment = pl.from_epoch("timestamp")
            weekend = pl.when(moment.dt.weekday() >= 6).then(pl.lit("weekend")).otherwise(pl.lit("weekday"))
            frame = frame.with_columns(weekend.alias("weekday"), moment.dt.hour().cast(pl.String).alias("hour_in_day"))
        for name, column in lists.items():
            frame = frame.with_columns(Rows(frame, block.where).convert(column, name))
        if not reading.labelled:
            wanted = frame.select(c.name for c in columns if reading.wants(c))
            return pl.DataFrame([*wanted.get_columns(), *rows.kept(reading.kept)])
        return frame.select("__label", *((TIME,) if timed else ()), *(c.name for c in columns))

    def chunks() -> Iterator[Chunk]:
        for block in read_blocks(ratings, layout):
            yield Chunk(block.consumed, partial(read, block))

    files = (ratings, *(ratings.parent / n for n in small))
    no_time = None if timed else f"{ratings.name} has no timestamps; use --split random or the original ratings.dat"
    notes = (f"label is rating > {LIKED_ABOVE}", *(f"{name} is a list" for name in lists))
    return Source(dataset, columns, files, chunks, no_time=no_time, notes=notes)


def _first(directory: Path, names: tuple[str, ...]) -> Path:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory. Check --input")
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise UserError(f"{directory}: no {' or '.join(names)} in this directory. Unpack the MovieLens archive there")


def _small(path: Path, layout: Layout) -> pl.DataFrame:
    """A side table (thousands of rows) as strings; its key is its first column."""
    frame = pl.concat([parse(block, layout) for block in read_blocks(path, layout)])
    key = layout.columns[0]
    twice = frame[key].is_duplicated()
    if twice.any():
        row = int(twice.arg_max() or 0)
        raise UserError(f"{path}: {key} {frame[key][row]!r} is there twice. Remove one of the lines")
    return frame


def _known(rows: Rows, key: str, side: pl.DataFrame, name: str) -> None:
    missing = ~rows.frame[key].is_in(side[key].implode())
    missing = missing.fill_null(True)
    if missing.any():
        row = int(missing.arg_max() or 0)
        raise UserError(
            f"{rows.where(row)}: {key} {rows.frame[key][row]!r} is not in {name}. Use files of the same release"
        )
