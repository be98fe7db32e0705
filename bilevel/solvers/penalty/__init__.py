"""Hessian-free and constrained methods: a penalised objective, auxiliary variables, a penalty schedule.

`bilevel.solvers` has their names.
"""
