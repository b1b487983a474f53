"""Show training runs on a web page, as they go.

    echo-eqx monitor --runs runs/
    echo-eqx monitor --runs runs/ --host 0.0.0.0 --token SECRET

--runs is a folder of runs, or a run. The page is at http://127.0.0.1:8080 until Ctrl-C; it needs no
internet, and nothing in it can change a run.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from echo_eqx.cli import parse
from echo_eqx.ops.monitor import MonitorServer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Args:
    runs: Path
    """Folder of runs (each a --run_dir of train.py), or one run."""
    port: int = 8080
    """Port of the page; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 lets other machines in, and needs --token."""
    token: str | None = None
    """Text that a browser must give once, as ?token=TEXT behind the address."""


def main() -> None:
    args = parse(Args, __doc__)
    server = MonitorServer(args.runs, args.host, args.port, args.token)
    name = f"[{args.host}]" if ":" in args.host else args.host
    once = "/?token=TEXT" if args.token else "/"
    logger.info(f"{args.runs} is shown at http://{name}:{server.server_port}{once} until Ctrl-C")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
