"""The server: a bilevel solver whose oracles are messages."""

from __future__ import annotations

import logging

from flwr.serverapp import ServerApp

from bilevel.integrations import flower
from bilevel.solvers import FedMBO, SimFBO
from federated_flower.task import accuracy, start

app = ServerApp()


def run(grid, config) -> flower.Solution:
    clients = int(config["clients"])
    solvers = {
        "simfbo": lambda: SimFBO(clients, 0.2, 0.3, 0.3, radius=10.0),
        "fedmbo": lambda: FedMBO(clients, 0.2, 0.3, lower_rounds=3, terms=5),
    }
    x0, y0 = start(int(config["hidden"]), int(config["seed"]))

    def report(step, x, y, metrics):
        missing = f", {metrics['missing_clients']} missing" if metrics["missing_clients"] else ""
        print(f"step {step}: loss {metrics['upper_loss']:.3f}, test accuracy {accuracy(x, y):.3f}{missing}", flush=True)

    solution = flower.run(
        grid, solvers[str(config["method"])](), x0, y0, steps=int(config["rounds"]), key=int(config["seed"]),
        timeout=float(config["timeout"]), callback=report,
    )  # fmt: skip
    print(solution, flush=True)
    return solution


@app.main()
def main(grid, context):
    logging.basicConfig(level=logging.WARNING)
    run(grid, context.run_config)
