"""Decentralised methods: agents on a graph, no server. `bilevel.solvers` has their names."""
