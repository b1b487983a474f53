"""Show training runs live on a web page.

    echo-eqx monitor --runs runs/
    echo-eqx monitor --runs runs/ --host 0.0.0.0 --token SECRET

--runs is a folder of runs, or a run. The page is at http://127.0.0.1:8080 until Ctrl-C. It needs no
internet access and cannot change a run.
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
    """Folder of runs (each a --run_dir of train), or one run."""
    port: int = 8080
    """Port of the page; 0 picks a free one."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 can be reached from other machines and needs --token."""
    token: str | None = None
    """Secret that a browser must send once, as ?token=TEXT at the end of the address."""


def main() -> None:
    args = parse(Args, __doc__)
    server = MonitorServer(args.runs, args.host, args.port, args.token)
    name = f"[{args.host}]" if ":" in args.host else args.host
    query = "?token=TEXT" if args.token else ""
    logger.info(f"{args.runs} is shown at http://{name}:{server.server_port}/{query} until Ctrl-C")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
