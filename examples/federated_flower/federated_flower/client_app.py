"""The client: answers the oracles on its own data."""

from __future__ import annotations

from bilevel.integrations import flower
from federated_flower.task import client_problem, start


def setup(context):
    node, run = context.node_config, context.run_config
    x, y = start(int(run["hidden"]), int(run["seed"]))
    return client_problem(int(node["partition-id"]), int(node["num-partitions"])), x, y


app = flower.client_app(setup)
