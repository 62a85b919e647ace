"""`msr serve`: a page on which a song is dropped and heard as stems, and the HTTP API underneath."""

import argparse
import importlib.util
import math
import re
import secrets
import signal
import threading
from pathlib import Path
from urllib.parse import quote

from msr_jax.errors import UserError
from msr_jax.process import HUNG_UP

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="msr serve", description=__doc__)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than this machine's need a token"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME|DIR",
        help="model to offer; repeatable (default: the bundled one)",
    )
    parser.add_argument("--max-minutes", type=float, default=20, help="longest song (default 20)")
    parser.add_argument("--max-upload-mb", type=float, default=200, help="largest file (default 200)")
    parser.add_argument("--max-queue", type=int, default=200, help="songs that may wait (default 200)")
    parser.add_argument("--jobs", type=int, default=1, help="songs at a time (default 1)")
    parser.add_argument(
        "--keep-hours", type=float, default=1, help="files are removed so long after a job's end (default 1)"
    )
    parser.add_argument(
        "--token", help="what visitors must bring; made up and printed where --host is not this machine's"
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="site whose pages may use the API, such as https://friend.example; repeatable",
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where files are kept (default: a temporary folder)")
    return parser


def origin_of(text: str) -> str:
    """A site as browsers name it in a request: small letters, no path, the scheme's usual port left out.

    Raises:
      UserError: no browser would name a site so.
    """
    origin = re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", text.lower().rstrip("/"))
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?", origin):
        raise UserError(
            f"--allow-origin takes one site as browsers name it, such as https://friend.example, without a path, not '{text}'"
        )
    return origin


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    for name in ("max_minutes", "max_upload_mb", "max_queue", "jobs", "keep_hours"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port must lie between 0 and 65535, not {args.port}")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"msr serve needs {', '.join(missing)}: pip install 'msr_jax[web]'")
    from msr_jax.serve.guard import is_loopback

    if args.token and not args.token.isascii():
        raise UserError("--token must be of ASCII characters: no other reaches the server in a request's header")
    args.allow_origin = [origin_of(text) for text in args.allow_origin]
    token = args.token or (None if is_loopback(args.host) else secrets.token_urlsafe(16))
    return _serve(args, token)


def _serve(args: argparse.Namespace, token: str | None) -> int:
    import socket

    import uvicorn

    from msr_jax.serve.api import make_app
    from msr_jax.serve.decode import Limits
    from msr_jax.serve.jobs import Desk
    from msr_jax.serve.models import Models

    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
        listener.listen()  # who opens the printed link at once waits instead of being refused
    except OSError as error:
        raise UserError(f"cannot listen on {args.host}:{args.port}: {error.strerror}") from error
    models = Models(args.model)
    threading.Thread(target=models.warm, daemon=True).start()
    desk = Desk(models, Limits(args.max_minutes), args.jobs, args.keep_hours, args.max_queue, args.folder)
    app = make_app(desk, token, int(args.max_upload_mb * 1e6), tuple(args.allow_origin))
    name = socket.gethostname() if args.host in ("0.0.0.0", "::") else args.host  # by which others reach it
    shown = f"[{name}]" if ":" in name else name
    link = f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={quote(token, safe='')}" if token else "")
    print(f"open {link}   (Ctrl-C ends it and removes its files)", flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,  # seconds
        server_header=False,
        h11_max_incomplete_event_size=1 << 16,
    )
    server = uvicorn.Server(config)
    app.state.is_ending = lambda: server.should_exit
    if HUNG_UP and signal.getsignal(signal.SIGHUP) is HUNG_UP:  # of a closed terminal: uvicorn knows SIGTERM alone
        signal.signal(signal.SIGHUP, lambda _, frame: server.handle_exit(signal.SIGTERM, frame))
    server.run([listener])
    return 0
