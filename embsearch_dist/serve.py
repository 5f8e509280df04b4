"""Serve a model directory over HTTP: JSON rows in, probabilities out.

    python -m embsearch_dist.serve exported/my
    curl -s localhost:8000/predict -H 'content-type: application/json' -d '{"rows": [{"user": "u7", "item": "i3"}]}'

Needs the extra ``serve`` (starlette, uvicorn, safetensors). It listens on this machine alone unless ``--host`` says
otherwise; it has neither encryption nor log-in, so put a proxy in front of it before others can reach it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from embsearch_dist.errors import UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m embsearch_dist.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", type=Path, help="directory that export.py made")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="default %(default)s; 0: any free one")
    p.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="of a request (default %(default)s)")
    p.add_argument("--max-rows", type=int, default=4096, metavar="N", help="of a request (default %(default)s)")
    p.add_argument("--batch-rows", type=int, default=4096, metavar="N", help="predicted together (default %(default)s)")
    p.add_argument("--delay-ms", type=float, default=0.0, help="how long a request waits for company (default 0)")
    p.add_argument("--max-connections", type=int, default=512, metavar="N", help="default %(default)s; more get a 503")
    p.add_argument("--module", default="", metavar="FILE.py", help="registers a backbone of your own; its code is run")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="of the model (default: torch's own choice)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        for name in ("max_body", "max_rows", "batch_rows", "max_connections"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1. Give another")
        if not 0 <= args.port < 1 << 16 or args.delay_ms < 0 or args.threads < 0:
            raise UserError("--port is from 0 to 65535, --delay-ms and --threads are at least 0. Give another")
        return serve(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return 2


def serve(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from embsearch_dist.serving.server import Limits, application
    except ImportError as e:
        raise UserError(f"{e.name} is missing. Install it: pip install 'embsearch_dist[serve]'") from e
    import torch

    from embsearch_dist.config.own_module import load_module
    from embsearch_dist.serving.directory import open_directory

    load_module(args.module, "--module")
    if args.threads:
        torch.set_num_threads(args.threads)
    limits = Limits(args.max_body, args.max_rows, args.batch_rows, delay_s=args.delay_ms / 1000)
    app = application(open_directory(args.model), limits)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        limit_concurrency=args.max_connections,
        server_header=False,
    )

    class Server(uvicorn.Server):
        """Says where it listens, once it does."""

        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            for socket in (s for server in getattr(self, "servers", []) for s in server.sockets):
                host, port = socket.getsockname()[:2]
                print(f"listening on http://{host}:{port} (Ctrl-C ends it)", flush=True)

    try:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C: the server has answered what was open by then
            Server(config).run()
    except SystemExit as e:  # uvicorn ends so when the port is taken, and has said why
        raise UserError(f"--port {args.port}: {args.host} cannot be listened on. Give another --port or --host") from e
    return 0


if __name__ == "__main__":
    sys.exit(main())
