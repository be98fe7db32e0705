"""Constitutive laws: elastic ones give the Kirchhoff stress of F, plastic ones the corrected F.

Each is a plain function `(F, parameters) -> (..., d, d)`, with F of shape (..., d, d), d = 2 (plane strain) or 3, and
finite derivatives of every order at rest and where singular values coincide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.applications.discovery.tensors import (
    determinant,
    deviator,
    exp_symmetric,
    half_log,
    polar_rotation,
    trace,
)

__all__ = ["ELASTIC", "PLASTIC", "energy_stress", "invariants", "lame", "yield_return"]

Parameters = Mapping[str, Any]


def lame(parameters: Parameters) -> tuple[Any, Any]:
    """Lame's mu and lambda from Young's modulus E and Poisson's ratio nu."""
    e, nu = parameters["E"], parameters["nu"]
    return e / (2 * (1 + nu)), e * nu / ((1 + nu) * (1 - 2 * nu))


def _t(a: Any) -> Any:
    return jnp.swapaxes(a, -1, -2)


def _by(scalar: Any) -> Any:
    return scalar[..., None, None]


def _eye(f: Any) -> Any:
    return jnp.eye(f.shape[-1], dtype=f.dtype)


def _log(j: Any) -> Any:
    """log J, continued below 0.01 by a constant."""
    return jnp.log(jnp.maximum(j, 0.01))


def linear(f: Any, parameters: Parameters) -> Any:
    """tau = [mu (F + F' - 2I) + lambda tr(F - I) I] F'."""
    mu, lam = lame(parameters)
    eye = _eye(f)
    return (mu * (f + _t(f) - 2 * eye) + lam * _by(trace(f - eye)) * eye) @ _t(f)


def corotated(f: Any, parameters: Parameters) -> Any:
    """tau = 2 mu (F - R) F' + lambda J (J - 1) I."""
    mu, lam = lame(parameters)
    j = determinant(f)
    return 2 * mu * (f - polar_rotation(f)) @ _t(f) + lam * _by(j * (j - 1)) * _eye(f)


def neo_hookean(f: Any, parameters: Parameters) -> Any:
    """tau = mu (F F' - I) + lambda log(J) I, of W = mu/2 (tr F'F - d - 2 log J) + lambda/2 log(J)^2."""
    mu, lam = lame(parameters)
    return mu * (f @ _t(f) - _eye(f)) + lam * _by(_log(determinant(f))) * _eye(f)


def hencky(f: Any, parameters: Parameters) -> Any:
    """tau = 2 mu e + lambda tr(e) I with e = log V, the logarithmic strain."""
    mu, lam = lame(parameters)
    strain = half_log(f @ _t(f))
    return 2 * mu * strain + lam * _by(trace(strain)) * _eye(f)


ELASTIC: dict[str, Callable[[Any, Parameters], Any]] = {
    "linear": linear,
    "corotated": corotated,
    "neo_hookean": neo_hookean,
    "hencky": hencky,
}


def invariants(f: Any) -> tuple[Any, Any]:
    """(I1, J) = (tr F'F, det F)."""
    return jnp.sum(f**2, (-2, -1)), determinant(f)


def energy_stress(energy: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """tau(F) = 2 W_1 F F' + J W_J I of an energy W(I1, J): objective, isotropic and hyperelastic whatever W is."""

    def stress(f: Any) -> Any:
        i1, j = invariants(f)
        by_i1 = jax.jvp(lambda a: energy(a, j), (i1,), (jnp.ones_like(i1),))[1]
        by_j = jax.jvp(lambda b: energy(i1, b), (j,), (jnp.ones_like(j),))[1]
        return 2 * _by(by_i1) * (f @ _t(f)) + _by(j * by_j) * _eye(f)

    return stress


# ---------------------------------------------------------------- plasticity


def _norm(dev: Any) -> Any:
    """|dev| with a finite derivative at 0."""
    square = jnp.sum(dev**2, (-2, -1))
    inside = square > 1e-16
    return jnp.where(inside, jnp.sqrt(jnp.where(inside, square, 1.0)), 0.0)


def _shrunk(f: Any, dev: Any, norm: Any, radius: Any, volume: Any = None) -> Any:
    """F with its deviatoric strain cut to `radius`, and its volume strain changed by `volume` in each direction."""
    radius = jnp.maximum(radius, 0.0)
    outside = norm > radius
    cut = jnp.where(outside, 1 - radius / jnp.where(outside, norm, 1.0), 0.0)
    change = -_by(cut) * dev
    if volume is not None:
        change = change + _by(volume) * _eye(f)
    return exp_symmetric(change) @ f  # coaxial: exp(e + change) = exp(change) exp(e)


def von_mises(f: Any, parameters: Parameters) -> Any:
    """F <- exp(e') R, where the deviatoric part of e = log V is at most yield_stress / (2 mu) long."""
    mu, _ = lame(parameters)
    dev = deviator(half_log(f @ _t(f)))
    return _shrunk(f, dev, _norm(dev), parameters["yield_stress"] / (2 * mu))


def drucker_prager(f: Any, parameters: Parameters) -> Any:
    """Sand: no strain in tension (tr e > 0), else |dev e| at most -(d lambda + 2 mu)/(2 mu) alpha tr e.

    alpha = sqrt(2/3) 2 sin(friction) / (3 - sin(friction)), with the angle of friction in degrees; no cohesion.
    """
    mu, lam = lame(parameters)
    sine = jnp.sin(jnp.deg2rad(parameters["friction"]))
    alpha = jnp.sqrt(2 / 3) * 2 * sine / (3 - sine)
    strain = half_log(f @ _t(f))
    dev, total, d = deviator(strain), trace(strain), f.shape[-1]
    radius = -(d * lam + 2 * mu) / (2 * mu) * alpha * total
    return _shrunk(f, dev, _norm(dev), radius, -jnp.maximum(total, 0.0) / d)


def water(f: Any, parameters: Parameters) -> Any:
    """F <- J^(1/d) I."""
    j = jnp.maximum(determinant(f), 0.01)
    return _by(j ** (1 / f.shape[-1])) * _eye(f)


def identity(f: Any, parameters: Parameters) -> Any:
    """No plasticity."""
    return f


PLASTIC: dict[str, Callable[[Any, Parameters], Any]] = {
    "identity": identity,
    "von_mises": von_mises,
    "drucker_prager": drucker_prager,
    "water": water,
}


def yield_return(radius: Callable[[Any, Any], Any], tension: bool = True) -> Callable[[Any], Any]:
    """The return map of a yield radius r(t, n) of t = tr e and n = |dev e|: n <- min(n, max(r, 0)).

    With `tension=False` positive t is returned to zero besides, as sand does. What a proposer chooses below is r.
    """

    def corrected(f: Any) -> Any:
        strain = half_log(f @ _t(f))
        dev, total = deviator(strain), trace(strain)
        norm = _norm(dev)
        volume = None if tension else -jnp.maximum(total, 0.0) / f.shape[-1]
        return _shrunk(f, dev, norm, radius(total, norm), volume)

    return corrected
