"""Counters of the server, in the text format of Prometheus."""

from __future__ import annotations

from itertools import accumulate

EDGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds
PREFIX = "embsearch"


class Metrics:
    """All of the event loop's thread, so there are no locks."""

    def __init__(self) -> None:
        self.requests: dict[int, int] = {}
        self.seconds, self.buckets = 0.0, [0] * (len(EDGES) + 1)
        self.predicted = self.batches = self.batched = 0

    def request(self, status: int, seconds: float) -> None:
        """An answer was given; only good ones are timed."""
        self.requests[status] = self.requests.get(status, 0) + 1
        if status == 200:
            self.seconds += seconds
            self.buckets[next((k for k, edge in enumerate(EDGES) if seconds <= edge), len(EDGES))] += 1

    def rows(self, n: int) -> None:
        """Rows were answered."""
        self.predicted += n

    def batch(self, rows: int) -> None:
        """The model was called."""
        self.batches += 1
        self.batched += rows

    def text(self) -> str:
        """All of them."""
        lines = [f"# TYPE {PREFIX}_requests_total counter"]
        lines += [f'{PREFIX}_requests_total{{status="{s}"}} {n}' for s, n in sorted(self.requests.items())]
        for name, value in (("rows", self.predicted), ("batches", self.batches), ("batched_rows", self.batched)):
            lines += [f"# TYPE {PREFIX}_{name}_total counter", f"{PREFIX}_{name}_total {value}"]
        lines.append(f"# TYPE {PREFIX}_request_seconds histogram")
        for edge, n in zip((*map(str, EDGES), "+Inf"), accumulate(self.buckets), strict=True):
            lines.append(f'{PREFIX}_request_seconds_bucket{{le="{edge}"}} {n}')
        lines += [f"{PREFIX}_request_seconds_sum {self.seconds:.6f}"]
        lines += [f"{PREFIX}_request_seconds_count {sum(self.buckets)}"]
        return "\n".join(lines) + "\n"
