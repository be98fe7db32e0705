"""Every constructor of the package on one small problem: what the tests of dtypes and of JAX's settings run through."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, data, hypergradients, linear, lower, network, solvers

AGENTS, SAMPLES, FEATURES = 3, 4, 3


def _weights(x: Any, y: Any) -> tuple[Any, Any, Any]:
    return (0.0 * y["w"] if x is None else x), y["w"], y["b"]


def _residual(y: Any, batch: Any) -> Any:
    """Of a linear model whose targets are noisy and whose samples are weighted: all leaves of the batch are used."""
    noise = 0.01 * jax.vmap(lambda key: jax.random.normal(key, dtype=batch["a"].dtype))(batch["key"])
    weight = 1 + batch["label"].astype(batch["a"].dtype)
    dtype = batch["a"].dtype
    return weight * (batch["a"] @ y["w"].astype(dtype) + y["b"].astype(dtype) - batch["t"] - noise)


def upper_loss(x: Any, y: Any, batch: Any) -> Any:
    """F(x, y, batch)."""
    x, *_ = _weights(x, y)
    penalty = 0.01 * jnp.sum(x.astype(jnp.float32) ** 2)
    return jnp.mean(_residual(y, batch) ** 2) / 2 + penalty.astype(batch["a"].dtype)


def lower_loss(x: Any, y: Any, batch: Any) -> Any:
    """f(x, y, batch)."""
    x, w, b = _weights(x, y)
    decay = (jnp.exp(x.astype(jnp.float32)) * w.astype(jnp.float32) ** 2).sum() + b.astype(jnp.float32) ** 2
    return jnp.mean(_residual(y, batch) ** 2) / 2 + 0.5 * decay.astype(batch["a"].dtype)


def budget(x: Any, y: Any) -> Any:
    """An affine coupled inequality, g <= 0."""
    return jnp.sum(y["w"]) - 5


def tie(x: Any, y: Any) -> Any:
    """An affine coupled equality, h = 0."""
    return y["w"][0] - y["w"][1]


@functools.cache
def arrays(dtype: Any = np.float32, seed: int = 0) -> dict[str, Any]:
    """Samples of all agents, leading axes (agents, samples), with typed keys and integers among the leaves."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(AGENTS, SAMPLES, FEATURES)) / 2
    t = a @ np.ones(FEATURES) + 0.1 * rng.normal(size=(AGENTS, SAMPLES))
    keys = jax.random.split(jax.random.key(seed), (AGENTS, SAMPLES))
    label = rng.integers(0, 2, size=(AGENTS, SAMPLES)).astype(np.int32)
    return {"a": jnp.asarray(a, dtype), "t": jnp.asarray(t, dtype), "key": keys, "label": jnp.asarray(label)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A constructor with what it needs of a problem.

    Attributes:
      make: the solver.
      needs: "arrays", "minibatches" or "agents" for the data; "simple" for no x.
      rows: the problem's constraints.
    """

    make: Callable[[], Any]
    needs: str = "arrays"
    rows: tuple[tuple[str, Any], ...] = ()

    def problem(self, dtype: Any = np.float32) -> Problem:
        """The problem."""
        up, low = arrays(dtype, 0), arrays(dtype, 1)
        if self.needs == "agents":
            sources = data.Agents(up), data.Agents(low)
        else:
            pool = lambda a: a.reshape(-1, *a.shape[2:])
            up, low = jax.tree.map(pool, up), jax.tree.map(pool, low)
            sources = up, low
            if self.needs == "minibatches":
                sources = data.Minibatches(up, 4, blocks=True), data.Minibatches(low, 4, blocks=True)
        return Problem(upper_loss, lower_loss, *sources, **dict(self.rows))

    def start(self, x: Any = np.float32, w: Any = np.float32, b: Any = np.float32) -> tuple[Any, Any]:
        """x0 and y0 with these dtypes."""
        x0 = None if self.needs == "simple" else jnp.full((FEATURES,), 0.5, x)
        return x0, {"w": jnp.full((FEATURES,), 0.25, w), "b": jnp.asarray(0.25, b)}


_RING = network.ring(AGENTS)
_EQUAL = (("equality", tie),)
_INEQUAL = (("constraint", budget),)

SOLVERS: dict[str, Case] = {
    "AID": Case(solvers.AID),
    "AID Newton": Case(lambda: solvers.AID(lower.Newton())),
    "AdamSOBA": Case(solvers.AdamSOBA, "minibatches"),
    "AggITD": Case(lambda: solvers.AggITD(None), "agents"),
    "AiPOD": Case(solvers.AiPOD, rows=_EQUAL),
    "Alternating": Case(lambda: solvers.Alternating(0.05, 0.05), "simple"),
    "AmIGO": Case(solvers.AmIGO, "minibatches"),
    "BLOCC": Case(lambda: solvers.BLOCC(inner_steps=5, rounds=2), rows=_INEQUAL),
    "BOME": Case(solvers.BOME),
    "BSA": Case(solvers.BSA, "minibatches"),
    "BVFSM": Case(lambda: solvers.BVFSM(starts=2, inner_steps=5)),
    "Combined": Case(lambda: solvers.WeightedSum(optax.adam(0.05)), "simple"),
    "DynamicBarrier": Case(lambda: solvers.DynamicBarrier(0.05), "simple"),
    "LossMultiplier": Case(lambda: solvers.LossMultiplier(0.05), "simple"),
    "PenaltyDescent": Case(lambda: solvers.PenaltyDescent(0.05), "simple"),
    "WeightedSum": Case(lambda: solvers.WeightedSum(0.05), "simple"),
    "BiCGAFFA": Case(solvers.BiCGAFFA, rows=_INEQUAL),
    "BiGSAM": Case(solvers.BiGSAM, "simple"),
    "CentralF2SA": Case(solvers.CentralF2SA),
    "DARTS": Case(solvers.DARTS),
    "DSOBA": Case(lambda: solvers.DSOBA(_RING), "agents"),
    "DTFBO": Case(solvers.DTFBO),
    "Decentralized": Case(lambda: solvers.Decentralized(_RING), "agents"),
    "F2BA": Case(solvers.F2BA),
    "F2SA": Case(solvers.F2SA),
    "FSLA": Case(solvers.FSLA),
    "FedBiO": Case(solvers.FedBiO, "agents"),
    "FedBiOAcc": Case(solvers.FedBiOAcc, "agents"),
    "FedMBO": Case(lambda: solvers.FedMBO(None), "agents"),
    "FedNest": Case(lambda: solvers.FedNest(None), "agents"),
    "FederatedNested": Case(solvers.FederatedNested, "agents"),
    "FederatedSingleLoop": Case(solvers.FederatedSingleLoop, "agents"),
    "GALET": Case(solvers.GALET),
    "GAM": Case(lambda: solvers.GAM(inner_steps=5, rounds=2), rows=_INEQUAL),
    "GPBGD": Case(solvers.GPBGD),
    "GTDSBO": Case(lambda: solvers.GTDSBO(_RING), "agents"),
    "HypergradientDescent": Case(solvers.HypergradientDescent),
    "IMAML": Case(lambda: solvers.HypergradientDescent(hypergradients.Implicit(linear.TaskCG()))),
    "ITD": Case(lambda: solvers.ITD(3)),
    "IterativeRegularization": Case(solvers.IterativeRegularization, "simple"),
    "LFedNest": Case(lambda: solvers.LFedNest(None), "agents"),
    "LVHBA": Case(solvers.LVHBA, rows=_INEQUAL),
    "MADSBO": Case(lambda: solvers.MADSBO(_RING), "agents"),
    "MAML": Case(lambda: solvers.MAML(2, start=lambda x, y: {"w": x, "b": y["b"]})),
    "MASOBA": Case(solvers.MASOBA, "minibatches"),
    "MEHA": Case(solvers.MEHA),
    "MPCC": Case(lambda: solvers.MPCC(starts=1, rounds=2, lower_starts=1)),
    "MRBO": Case(solvers.MRBO, "minibatches"),
    "OneStep": Case(solvers.OneStep),
    "ProbedSingleLoop": Case(solvers.ProbedSingleLoop, "minibatches"),
    "SABA": Case(solvers.SABA, "minibatches"),
    "SAMA": Case(lambda: solvers.SAMA(0.01, 0.01)),
    "SFLCB": Case(solvers.SFLCB, rows=_INEQUAL),
    "SLDBO": Case(lambda: solvers.SLDBO(_RING), "agents"),
    "SOBA": Case(solvers.SOBA, "minibatches"),
    "SPABA": Case(solvers.SPABA, "minibatches"),
    "SPARKLE": Case(lambda: solvers.SPARKLE(_RING), "agents"),
    "SRBA": Case(solvers.SRBA, "minibatches"),
    "STFBO": Case(solvers.STFBO),
    "SUSTAIN": Case(solvers.SUSTAIN, "minibatches"),
    "ShroFBO": Case(lambda: solvers.ShroFBO(None), "agents"),
    "SimFBO": Case(lambda: solvers.SimFBO(None), "agents"),
    "SingleLoop": Case(solvers.SingleLoop),
    "SingleLoopF2SA": Case(solvers.SingleLoopF2SA, "minibatches"),
    "StocBiO": Case(solvers.StocBiO, "minibatches"),
    "T1T2": Case(solvers.T1T2),
    "TTSA": Case(solvers.TTSA, "minibatches"),
    "TruncatedITD": Case(lambda: solvers.TruncatedITD(4, 2)),
    "UpperFirst": Case(
        lambda: solvers.UpperFirst(hypergradients.FiniteDifference(), lower.GradientDescent(0.1, 1), 0.01)
    ),
    "VPBGD": Case(solvers.VPBGD),
    "VRBO": Case(solvers.VRBO, "minibatches"),
}

_DESCENT = lower.GradientDescent(0.1, 3)

ESTIMATORS: dict[str, tuple[Any, Any, Case]] = {
    "ActiveSet": (hypergradients.ActiveSet(), lower.Accurate(5, 2), Case(solvers.GAM, rows=_INEQUAL)),
    "FiniteDifference": (hypergradients.FiniteDifference(), _DESCENT, Case(solvers.DARTS)),
    "FirstOrder": (hypergradients.FirstOrder(), _DESCENT, Case(solvers.DARTS)),
    "HOZOG": (hypergradients.HOZOG(), _DESCENT, Case(solvers.AID)),
    "Implicit": (hypergradients.Implicit(), _DESCENT, Case(solvers.AID)),
    "JacobianFree": (hypergradients.JacobianFree(), _DESCENT, Case(solvers.AID)),
    "LeastSquares": (hypergradients.LeastSquares(), lower.ScaledDescent(5), Case(solvers.GALET)),
    "NullSpace": (hypergradients.NullSpace(), lower.EqualityDescent(), Case(solvers.AiPOD, rows=_EQUAL)),
    "OneStep": (hypergradients.OneStep(), _DESCENT, Case(solvers.AID)),
    "PZOBO": (hypergradients.PZOBO(), _DESCENT, Case(solvers.AID)),
    "SAMA": (hypergradients.SAMA(), _DESCENT, Case(solvers.AID)),
    "StochasticImplicit": (hypergradients.StochasticImplicit(), _DESCENT, Case(solvers.BSA, "minibatches")),
    "Unrolled": (hypergradients.Unrolled(), _DESCENT, Case(solvers.AID)),
    "Unrolled forward": (hypergradients.Unrolled(mode="forward"), _DESCENT, Case(solvers.AID)),
}

LOWER: dict[str, tuple[Any, Case]] = {
    "Accurate": (lower.Accurate(5, 2), Case(solvers.AID)),
    "EqualityDescent": (lower.EqualityDescent(), Case(solvers.AiPOD, rows=_EQUAL)),
    "Function": (lower.Function(lambda level, x, y: y), Case(solvers.AID)),
    "GradientDescent": (lower.GradientDescent(), Case(solvers.AID)),
    "LBFGS": (lower.LBFGS(), Case(solvers.AID)),
    "MomentumSGD": (lower.MomentumSGD(), Case(solvers.AID)),
    "Newton": (lower.Newton(), Case(solvers.AID)),
    "Newton above dense": (lower.Newton(dense=1), Case(solvers.AID)),
    "ProximalGradient": (lower.ProximalGradient(5), Case(solvers.AID)),
    "ScaledDescent": (lower.ScaledDescent(), Case(solvers.AID)),
}

LINEAR: dict[str, Any] = {
    "BiCGStab": linear.BiCGStab(),
    "CG": linear.CG(),
    "CG Jacobi": linear.CG(preconditioner=linear.Jacobi()),
    "CG Nystrom": linear.CG(preconditioner=linear.NystromPreconditioner(2)),
    "CG StaleCholesky": linear.CG(preconditioner=linear.StaleCholesky()),
    "Dense": linear.Dense(),
    "GMRES": linear.GMRES(),
    "Identity": linear.Identity(),
    "MINRES": linear.MINRES(),
    "Neumann": linear.Neumann(0.1),
    "NormalCG": linear.NormalCG(),
    "Nystrom": linear.Nystrom(2),
    "Richardson": linear.Richardson(0.1),
    "Robust": linear.Robust(),
    "Robust above dense": linear.Robust(dense=1),
    "TaskCG": linear.TaskCG(),
}
