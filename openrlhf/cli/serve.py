"""Serve answers from a store of compressed documents: OpenAI's API, and a page in the browser.

python -m openrlhf.cli.serve --model CHECKPOINT --store STORE [--documents FOLDER] [--host 127.0.0.1] [--port 8000]

Requests must carry `Authorization: Bearer KEY` where CLARA_API_KEY is set in the environment. SIGTERM and SIGINT let
answers that are being written come to their end; a second SIGINT stops at once.
"""

import argparse
import importlib.util
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from openrlhf.cli.rag import DEFAULT_MODEL
from openrlhf.models.fingerprint import of_files
from openrlhf.rag.config import RAGConfig
from openrlhf.retrieval.corpus import Corpus
from openrlhf.retrieval.layout import HEADER_FILE, check_header, check_new, read_header
from openrlhf.utils.checkpoints import can_search, inspect_checkpoint

logger = logging.getLogger("openrlhf")
PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart", "bm25s": "bm25s"}
# Connections at once, idle ones included; uvicorn answers further ones with 503.
CONNECTIONS = 2000
DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where one is not known, or wrong."""
    parser = argparse.ArgumentParser("serve", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", help=f"stage2 checkpoint (default: rag_config's, else {DEFAULT_MODEL})")
    add("--model_path", help="base model, where the checkpoint's config names one that is not here")
    add("--store", type=Path, help="store of compressed documents, made where there is none (default: a cache folder)")
    add(
        "--documents", type=Path, help="folder of .txt and .md files, or JSONL file, to put into the store at the start"
    )
    add("--read_only", action="store_true", help="change no documents: for several servers over one store")
    add("--config", type=Path, help="rag_config.yaml (default: the one in the checkpoint's directory)")
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen at (default 8000), 0 for a free one")
    add("--engine", choices=("local", "vllm"), default="local", help="who writes the answers (default local)")
    add("--vllm_url", help="a vLLM server with --enable-prompt-embeds, for --engine vllm")
    add("--vllm_model", help="what that server calls the generator")
    add("--max_batch", type=int, default=32, help="answers written at once (default 32)")
    add("--max_waiting", type=int, default=256, help="questions that may wait beside them (default 256)")
    add("--request_timeout", type=float, default=300, help="seconds for one request (default 300)")
    add("--max_body_mb", type=float, default=32, help="largest body, and so upload (default 32)")
    add("--shutdown_seconds", type=int, default=30, help="for running answers after a signal (default 30)")
    add("--dtype", choices=DTYPES, help="of the model (default: bfloat16 on a GPU, else float32)")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    args = parser.parse_args(argv)
    for name in ("max_batch", "request_timeout", "max_body_mb", "shutdown_seconds"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    if args.max_waiting < 0 or not 0 <= args.port < 65536:
        parser.error("--max_waiting must not be negative, --port must be between 0 and 65535")
    if (
        (args.engine == "vllm") != bool(args.vllm_url and args.vllm_model)
        or args.engine == "local"
        and (args.vllm_url or args.vllm_model)
    ):
        parser.error("--engine vllm needs --vllm_url and --vllm_model, and they need it")
    if args.read_only and args.documents:
        parser.error("--read_only changes no documents: leave --documents out")
    return args


def check(args: argparse.Namespace) -> tuple[RAGConfig, Corpus | None, socket.socket]:
    """What can be wrong is found here, before the model loads; the socket is bound.

    Raises:
        ValueError, OSError: in words.
    """
    missing = [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the server needs packages that are not installed: pip install {' '.join(missing)}")
    config = RAGConfig.chosen(args.config, args.model or DEFAULT_MODEL)
    args.model = args.model or config.compression.model or DEFAULT_MODEL
    root, ours, _ = inspect_checkpoint(args.model, args.model_path)
    if config.compression.enabled and not can_search(root, ours):
        raise ValueError(
            f"{root} is a {ours.training_stage} checkpoint without a query reasoner: a stage2 checkpoint is needed to "
            "choose documents"
        )
    if args.store is not None and ((args.store / HEADER_FILE).is_file() or args.read_only):
        check_header(args.store, read_header(args.store), of_files(root, ours))
    elif args.store is not None:
        check_new(args.store)
    passage = config.compression.passage_tokens
    corpus = Corpus(args.documents, skip_bad=True, passage_tokens=passage) if args.documents else None
    if corpus is not None:
        corpus.check()
    if args.device is not None:
        import torch

        try:
            torch.empty(1, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    from openrlhf.utils.http import bind

    return config, corpus, bind(args.host, args.port)


def load(args: argparse.Namespace, config: RAGConfig, corpus: Corpus | None):
    """The asker over a loaded model and its store; documents are put in first.

    Raises:
        ValueError, OSError: the store is another model's, or another process writes it.
    """
    import torch

    from openrlhf.cli.rag import kept_at
    from openrlhf.models.fingerprint import fingerprint
    from openrlhf.models.modeling_clara import CLaRa
    from openrlhf.rag.master import RAGMaster
    from openrlhf.serving.asking import Asker
    from openrlhf.serving.documents import Library
    from openrlhf.serving.engine import LocalEngine
    from openrlhf.serving.engines import Engine, EngineError
    from openrlhf.serving.turns import Turns

    options: dict = {"decoder_model_name": args.model_path} if args.model_path else {}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    model = CLaRa.from_pretrained(args.model, dtype=dtype, device_map=device, **options)
    model.router.lock = Turns()  # type: ignore[assignment]
    passage = config.compression.passage_tokens
    made_by = {**fingerprint(model), "for": "serve", **({"passage_tokens": passage} if passage else {})}
    where = args.store or kept_at(args.documents or Path("served"), made_by)
    library = Library(where, model, args.read_only, passage)
    if corpus is not None:
        library.fill(corpus)
    engine: Engine
    if args.engine == "vllm":
        from openrlhf.serving.vllm import VllmEngine

        try:
            engine = VllmEngine(model, args.vllm_url, args.vllm_model)
        except EngineError as error:
            raise OSError(str(error)) from None
    else:
        engine = LocalEngine(model, args.max_batch)
    return Asker(RAGMaster(model, config=config), library, engine)


def serve(args: argparse.Namespace, config: RAGConfig, corpus: Corpus | None, bound: socket.socket) -> None:
    """Serves until a signal comes."""
    import uvicorn

    from openrlhf.serving.app import Limits, create_app
    from openrlhf.utils.http import is_loopback
    from openrlhf.utils.logging import set_up_logging

    set_up_logging(0)
    asker = load(args, config, corpus)
    api_key = os.environ.get("CLARA_API_KEY") or None
    address, port = bound.getsockname()[:2]
    if api_key is None and not is_loopback(address):
        logger.warning(
            "anybody who reaches %s can read and change the documents: set CLARA_API_KEY, or listen at 127.0.0.1 only",
            address,
        )
    limits = Limits(args.max_batch + args.max_waiting, args.request_timeout, int(args.max_body_mb * 2**20))
    app = create_app(asker, api_key, limits, any_host=api_key is not None or not is_loopback(address))
    options = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=args.shutdown_seconds,
    )  # fmt: skip

    class Server(uvicorn.Server):
        """Refuses new questions from the first signal on, and stops at once at a second SIGINT."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.should_exit and sig == signal.SIGINT:
                os._exit(130)  # whatever runs: the store is whole at every moment
            app.state.server.stopping = True
            super().handle_exit(sig, frame)

    bound.listen(2048)  # so that who reads the next lines can connect
    shown = f"[{address}]" if ":" in address else address
    print(f"serving {asker.library.path}: {len(asker.library):,} documents, engine {args.engine}", flush=True)
    print(f"listening at http://{shown}:{port}, key {'needed' if api_key else 'not needed'}", flush=True)
    # uvicorn finishes what runs, then raises the signal again: a server that was asked to stop has not failed.
    with suppress(SystemExit, KeyboardInterrupt):
        Server(options).run(sockets=[bound])
    asker.close()


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    # Until uvicorn takes signals, and when it raises them again.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        config, corpus, bound = check(args)
        with bound:
            serve(args, config, corpus, bound)
        sys.stdout.flush()
        os._exit(0)  # what was given up may still compute in a thread, and would hold the process until it has ended
    except (ValueError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
