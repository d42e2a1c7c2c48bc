"""Serve exact search over a store of compressed documents.

python -m openrlhf.cli.serve_retrieval --store STORE [--host 127.0.0.1] [--port 5004] [--model CHECKPOINT]

Requests must carry `Authorization: Bearer KEY` where CLARA_API_KEY is set in the environment. SIGTERM and SIGINT let
requests that are running come to their end.
"""

import argparse
import importlib.util
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from openrlhf.retrieval.layout import check_header, read_header

logger = logging.getLogger("openrlhf")
GRACE_SECONDS = 30


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where one is not known, or missing."""
    parser = argparse.ArgumentParser("serve_retrieval", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--store", required=True, type=Path, help="store of compressed documents, see compress_corpus")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5004, help="port to listen at (default 5004), 0 for a free one")
    parser.add_argument("--model", help="CLaRa checkpoint with a query reasoner: takes questions as text too")
    parser.add_argument("--model_path", help="base model, where the checkpoint's config names one that is not here")
    parser.add_argument("--device", help="where documents are scored and texts encoded: cpu (default), cuda, cuda:1 …")
    parser.add_argument("--max_queries", type=int, default=256, help="most queries of a request (default 256)")
    parser.add_argument("--max_k", type=int, default=1000, help="most documents for a query (default 1000)")
    args = parser.parse_args(argv)
    wrong = [name for name in ("max_queries", "max_k") if getattr(args, name) < 1]
    if wrong:
        parser.error(f"--{wrong[0]} must be at least 1, got {getattr(args, wrong[0])}")
    if not 0 <= args.port < 65536:
        parser.error(f"--port must be between 0 and 65535, got {args.port}")
    if args.model_path and not args.model:
        parser.error("--model_path has no use without --model: leave it out")
    return args


def check(args: argparse.Namespace) -> socket.socket:
    """What can be wrong is found here, before anything big is loaded; the bound socket.

    Raises:
        ValueError, OSError: in words.
    """
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the service needs packages that are not installed: pip install {' '.join(missing)}")
    header = read_header(args.store)
    if args.model is not None:
        from openrlhf.utils.checkpoints import inspect_checkpoint

        _, config, _ = inspect_checkpoint(args.model, args.model_path)
        sizes = ("doc_max_length", "compr_rate")
        check_header(args.store, header, {name: getattr(config, name) for name in sizes})
    if args.device is not None:
        import torch

        try:
            torch.empty(1, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    from openrlhf.utils.http import bind

    return bind(args.host, args.port)


def load(args: argparse.Namespace):
    """The store, and the model or None.

    Raises:
        ValueError: they do not fit together, or the model cannot encode questions.
    """
    from openrlhf.retrieval.store import Store

    if args.model is None:
        return Store.open(args.store), None
    import torch

    from openrlhf.models.modeling_clara import CLaRa
    from openrlhf.retrieval.compress import fingerprint

    device = torch.device(args.device or "cpu")
    options = {"decoder_model_name": args.model_path} if args.model_path else {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = CLaRa.from_pretrained(args.model, dtype=dtype, **options)
    if not model.has_query_reasoner:
        raise ValueError(
            f"--model {args.model} has no query reasoner, so it cannot encode questions: give a checkpoint of "
            "stage2, or leave --model out and ask with vectors"
        )
    store = Store.open(args.store, fingerprint(model))
    if model.config.quantization == "no":
        model.to(device)  # type: ignore[arg-type]
    return store, model


def serve(args: argparse.Namespace, bound: socket.socket) -> None:
    """Serves until a signal comes."""
    import uvicorn

    from openrlhf.retrieval.service import Searcher, create_app
    from openrlhf.utils.http import is_loopback
    from openrlhf.utils.logging import set_up_logging

    set_up_logging(0)
    store, model = load(args)
    api_key = os.environ.get("CLARA_API_KEY") or None
    address, port = bound.getsockname()[:2]
    if api_key is None and not is_loopback(address):
        logger.warning(
            "anybody who reaches %s can read this store: set CLARA_API_KEY, or listen at 127.0.0.1 only", address
        )
    with store:
        searcher = Searcher(store, model, args.max_queries, args.max_k, args.device)
        app = create_app(searcher, api_key)
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
        )
        bound.listen()  # so that who reads the next lines can connect
        shown = f"[{address}]" if ":" in address else address
        print(f"serving {args.store}: {len(store):,} documents, fingerprint {searcher.fingerprint}", flush=True)
        print(f"listening at http://{shown}:{port}, key {'needed' if api_key else 'not needed'}", flush=True)
        uvicorn.Server(config).run(sockets=[bound])


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    # uvicorn finishes what runs, then raises the signal again: a service that was asked to stop has not failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    code = 2
    try:
        with check(args) as bound:
            code = 1
            serve(args, bound)
    except (ValueError, OSError) as error:
        print(f"serve_retrieval: {error}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
