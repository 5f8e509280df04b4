"""An S3 on loopback for the tests: moto's server in a thread, and what the tests put there and look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BUCKET = "bucket"


class Bucket:
    """The bucket of a server; ``env`` is what a process needs to find it."""

    def __init__(self, endpoint: str) -> None:
        from pyarrow.fs import S3FileSystem

        self.env = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.system: Any = S3FileSystem(
            access_key="test",
            secret_key="test",
            region="us-east-1",
            endpoint_override=endpoint,
            allow_bucket_creation=True,
        )
        self.system.create_dir(BUCKET)

    def put(self, folder: Path, prefix: str) -> str:
        """Upload a folder; its URL."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.write(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def write(self, key: str, data: bytes) -> None:
        with self.system.open_output_stream(f"{BUCKET}/{key}") as file:
            file.write(data)

    def read(self, key: str) -> bytes:
        with self.system.open_input_file(f"{BUCKET}/{key}") as file:
            return file.read()

    def names(self, prefix: str) -> list[str]:
        from pyarrow.fs import FileSelector

        base = f"{BUCKET}/{prefix}"
        chosen = FileSelector(base, recursive=True, allow_not_found=True)
        return sorted(i.path[len(base) + 1 :] for i in self.system.get_file_info(chosen) if i.is_file)


@contextmanager
def s3() -> Iterator[Bucket]:
    """A server with an empty bucket; the test is skipped where moto is not installed."""
    server_of = pytest.importorskip("moto.server", reason="moto with flask is not installed: no S3 to test with")
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield Bucket(f"http://{host}:{port}")
    finally:
        server.stop()
