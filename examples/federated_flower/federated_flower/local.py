"""The same app with all clients in this process: `python -m federated_flower.local`."""

from __future__ import annotations

import argparse

from bilevel.integrations import flower
from federated_flower.client_app import app as client
from federated_flower.server_app import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--method", choices=("simfbo", "fedmbo"), default="simfbo")
    given = parser.parse_args()
    config = {
        "clients": given.clients,
        "rounds": given.rounds,
        "method": given.method,
        "hidden": 16,
        "seed": 0,
        "timeout": 60.0,
    }
    run(flower.InProcessGrid(client, given.nodes, run_config=config), config)


if __name__ == "__main__":
    main()
