"""A server to be asked to stop: the real application and its real end, with light workers."""

import socket
import sys
from functools import partial
from pathlib import Path

import uvicorn

from server import services
from server.app import create_app
from server.cli.serve import GracefulServer
from server.workers.supervisor import Supervisor
from tests.support.app import CPU, install_test_models


def main(folder: Path, timeout_s: float) -> None:
    made = services.build_services(
        install_test_models(folder), [CPU], spawn=partial(Supervisor, module="tests.support.stub_worker")
    )
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], made.first_key, flush=True)
    config = uvicorn.Config(create_app(made), log_level="warning", timeout_graceful_shutdown=10)
    GracefulServer(config, made.dispatcher, timeout_s).run([listener])


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
