"""Simulation, laws, tasks and molecules, against central differences, closed forms and textbooks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import search
from bilevel.applications.discovery import (
    ELASTIC,
    MOLECULES,
    PLASTIC,
    Molecule,
    MoleculeProposer,
    Simulation,
    State,
    alchemical,
    block,
    energy,
    molecule_problem,
    relax,
    spectrum,
    task,
)
from bilevel.applications.discovery.tensors import exp_symmetric, half_log, polar_rotation
from bilevel.proposers import GrammarProposer, ReplayProposer, Trial

P = {"E": 2e5, "nu": 0.28, "yield_stress": 3e3, "friction": 25.0}
CASES = [(e, "identity") for e in ELASTIC] + [("hencky", p) for p in PLASTIC if p != "identity"]


@pytest.mark.parametrize("d", [2, 3])
def test_functions_of_matrices_are_those_of_their_eigenvalues(x64, d):
    f = np.eye(d) + 0.3 * np.random.default_rng(0).normal(size=(80, d, d))
    f = f[np.linalg.det(f) > 0.3]
    b = f @ f.transpose(0, 2, 1)
    w, q = np.linalg.eigh(b)
    u, _, vt = np.linalg.svd(f)

    @jax.jit
    def ours(f, b):
        strain = half_log(b)
        return strain, exp_symmetric(2 * strain), polar_rotation(f)

    strain, back, rotation = ours(f, b)
    np.testing.assert_allclose(strain, np.einsum("nij,nj,nkj->nik", q, np.log(w) / 2, q), atol=1e-12)
    np.testing.assert_allclose(back, b, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(rotation, u @ vt, atol=1e-12)


# In three dimensions von Mises' return map stands for Drucker and Prager's: their functions of matrices are the same.
SMOOTH = [
    pytest.param(law, d, marks=[pytest.mark.slow] if (law, d) == ("drucker_prager", 3) else [])
    for law in (*ELASTIC, *PLASTIC)
    for d in (2, 3)
]


@pytest.mark.parametrize(("law", "d"), SMOOTH)
def test_laws_are_smooth_at_rest_and_where_singular_values_coincide(x64, d, law):
    of = {**ELASTIC, **PLASTIC}[law]

    def gradient(f):
        g, value = jax.grad(lambda f: (lambda v: (v.sum(), v))(of(f, P)), has_aux=True)(f)
        return g, (g, value)

    both = jax.jit(jax.vmap(jax.jacfwd(gradient, has_aux=True)))
    hessian, (first, values) = both(np.stack([np.eye(d), 0.9 * np.eye(d)]))
    for derivative in (first, hessian):
        assert np.isfinite(derivative).all()
    if law in ELASTIC:
        np.testing.assert_allclose(values[0], 0, atol=1e-8)


def scene(steps, elastic, plastic, per_side=5):
    simulation, start = block(Simulation(grid=12), per_side, 0.35, (0.5, 0.46), velocity=(0.5, -1.5), spin=3.0)

    def loss(p):
        given = {"E": jnp.exp(p[0]), "nu": p[1], "yield_stress": jnp.exp(p[2]), "friction": 20 * p[3]}
        laws = (lambda f: ELASTIC[elastic](f, given)), (lambda f: PLASTIC[plastic](f, given))
        return 100 * jnp.mean((simulation.rollout(start, steps, *laws)[1].x - 0.4) ** 2)

    return loss, jnp.array([np.log(2e5), 0.28, np.log(3e3), 1.2])


@pytest.mark.slow
@pytest.mark.parametrize(("elastic", "plastic"), CASES)
def test_gradients_over_two_hundred_steps_are_central_differences(x64, elastic, plastic):
    loss, p = scene(200, elastic, plastic)
    value, h = jax.jit(loss), 1e-5
    wanted = np.array([(value(p.at[i].add(h)) - value(p.at[i].add(-h))) / (2 * h) for i in range(4)])
    for gradient in (jax.grad(loss), jax.jacfwd(loss)):
        found = np.asarray(jax.jit(gradient)(p))
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_second_order_is_a_difference_of_gradients(x64):
    loss, p = scene(20, "hencky", "identity", per_side=4)
    gradient, v, h = jax.jit(jax.grad(loss)), jnp.array([1.0, 0.3, 0.0, 0.0]), 1e-5
    found = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (v,))[1])(p)
    wanted = (gradient(p + h * v) - gradient(p - h * v)) / (2 * h)
    assert jnp.abs(found - wanted).max() <= 1e-6 * jnp.abs(wanted).max()


@pytest.mark.parametrize("d", [2, 3])
def test_a_step_is_the_papers_written_out_particle_by_particle(x64, d):
    """Hu et al.'s equations in loops over particles and nodes, with B-splines from their definition by distance."""
    simulation, start = block(Simulation(d, grid=9), 3, 0.25, 0.42)
    random = np.random.default_rng(d)
    n, g, dt = 3**d, simulation.grid, simulation.dt
    x = np.asarray(start.x) - 0.08 + random.uniform(-0.02, 0.02, (n, d))  # some of it in the walls
    v, c = random.normal(size=(n, d)), random.normal(size=(n, d, d))
    f = np.eye(d) + 0.1 * random.normal(size=(n, d, d))
    new = jax.jit(lambda s: simulation.step(s, lambda f: ELASTIC["neo_hookean"](f, P)))(State(x, v, c, f))

    def spline(r):
        return 0.75 - r**2 if abs(r) < 0.5 else 0.5 * (1.5 - abs(r)) ** 2 if abs(r) < 1.5 else 0.0

    mu, lam = P["E"] / (2 * (1 + P["nu"])), P["E"] * P["nu"] / ((1 + P["nu"]) * (1 - 2 * P["nu"]))
    nodes = list(np.ndindex(*(g,) * d))
    weight = {(i, p): np.prod([spline(x[p, a] * g - i[a]) for a in range(d)]) for i in nodes for p in range(n)}
    near = {k: w for k, w in weight.items() if w > 0}
    mass, momentum = {}, {}
    for (i, p), w in near.items():
        tau = mu * (f[p] @ f[p].T - np.eye(d)) + lam * np.log(np.linalg.det(f[p])) * np.eye(d)
        away = np.array(i) / g - x[p]
        impulse = -dt * simulation.volume * 4 * g**2 * tau @ away
        mass[i] = mass.get(i, 0) + w * simulation.mass
        momentum[i] = momentum.get(i, 0) + w * (simulation.mass * (v[p] + c[p] @ away) + impulse)
    velocity = {}
    for i in mass:
        u = momentum[i] / mass[i] + dt * np.array([0.0] * (d - 1) + [-9.8])
        u = np.where(np.array(i) < 3, np.maximum(u, 0), np.where(np.array(i) > g - 4, np.minimum(u, 0), u))
        velocity[i] = np.clip(u, -0.5 / g / dt, 0.5 / g / dt)
    to_v, to_c = np.zeros((n, d)), np.zeros((n, d, d))
    for (i, p), w in near.items():
        to_v[p] += w * velocity[i]
        to_c[p] += 4 * g**2 * w * np.outer(velocity[i], np.array(i) / g - x[p])
    moved = x + dt * to_v
    strained = f + dt * np.einsum("nij,njk->nik", to_c, f)
    for ours, written in zip(new, (moved, to_v, to_c, strained), strict=True):
        np.testing.assert_allclose(ours, written, rtol=1e-11, atol=1e-11 * np.abs(written).max())


def test_free_flight_keeps_momentum_and_nearly_energy(x64):
    simulation, start = block(
        Simulation(grid=16, gravity=0.0, walls="none", dt=2e-4), 6, 0.3, velocity=(0.4, 0.2), spin=6.0
    )
    law = lambda f: ELASTIC["neo_hookean"](f, {"E": 2e4, "nu": 0.3})
    end, _ = jax.jit(lambda s: simulation.rollout(s, 200, law))(start)
    for before, after in zip(simulation.momentum(start), simulation.momentum(end), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-10, atol=1e-12)
    mu, lam = 2e4 / 2.6, 2e4 * 0.3 / (1.3 * 0.4)

    def energy(f):
        j = jnp.linalg.det(f)
        return mu / 2 * (jnp.sum(f**2, (-2, -1)) - 2 - 2 * jnp.log(j)) + lam / 2 * jnp.log(j) ** 2

    before, after = simulation.energy(start, energy), simulation.energy(end, energy)
    assert 0.97 * before < after < 1.001 * before


@pytest.mark.parametrize("law", ELASTIC)
def test_plane_strain_in_three_dimensions_is_two(x64, law):
    f = jnp.array([[1.1, 0.2], [-0.1, 0.9]])
    deep = jnp.eye(3).at[:2, :2].set(f)
    np.testing.assert_allclose(ELASTIC[law](deep, P)[:2, :2], ELASTIC[law](f, P), rtol=1e-10)


def test_a_simulation_in_three_dimensions_is_that_in_two_where_nothing_depends_on_depth(x64):
    # A bar along the depth, moving in the plane alone.
    flat, start = block(Simulation(grid=12, walls="none"), 6, 0.3, (0.5, 0.55), velocity=(0.4, -0.8), spin=4.0)
    per_cell, law = 2, lambda f: ELASTIC["neo_hookean"](f, {"E": 2e4, "nu": 0.3})
    depth = (2 + (np.arange(8 * per_cell) + 0.5) / per_cell) / 12
    deep = Simulation(3, grid=12, walls="none", volume=flat.volume * (depth[1] - depth[0]))
    # The particles' depth is y, so that gravity (along the last axis) is in the plane of x and z.
    place = np.array([0, 2])
    n, k = len(start.x), len(depth)

    def stacked(a, fill):
        wide = np.zeros((n, k, *(3,) * (a.ndim - 1))) + fill
        index = np.ix_(range(n), range(k), *[place] * (a.ndim - 1))
        wide[index] = np.asarray(a)[:, None]
        return wide

    parts = [stacked(np.asarray(a), fill) for a, fill in zip(start, (0, 0, 0, np.eye(3)), strict=True)]
    parts[0][..., 1] = depth
    wide = State(*(jnp.asarray(a.reshape(n * k, *a.shape[2:])) for a in parts))
    two = jax.jit(lambda s: flat.rollout(s, 10, law)[0])(start)
    three = jax.jit(lambda s: deep.rollout(s, 10, law)[0])(wide)
    # Far from the two ends, which bulge freely: of what happens there a step of a wave arrives, and no more.
    middle = k // 2
    of = lambda a: np.asarray(a).reshape(n, k, *a.shape[1:])[:, middle]
    np.testing.assert_allclose(of(three.x)[:, place], two.x, rtol=1e-10)
    np.testing.assert_allclose(of(three.f)[:, place][:, :, place], two.f, atol=1e-8)
    assert np.abs(np.asarray(two.f) - np.eye(2)).max() > 1e-3


def test_what_is_thrown_at_the_edge_of_the_box_stays_where_its_stencil_is_whole(x64):
    simulation, start = block(Simulation(grid=12, walls="none"), 3, 0.2, 0.8, velocity=(9.0, 9.0))
    end, _ = simulation.rollout(start, 60, lambda f: ELASTIC["neo_hookean"](f, {"E": 2e4, "nu": 0.3}))
    _, weight, _ = simulation.weights(end.x)
    np.testing.assert_allclose(weight.sum(1), 1, rtol=1e-12)
    assert (np.asarray(weight) >= 0).all()
    assert float(end.x.max()) <= 1 - 2 * simulation.dx


def test_a_wrong_law_costs_and_the_truth_does_not(x64):
    small = task("elasticity", per_side=5, grid=14, steps=60, every=30)
    truth = small.parameters["elastic"]
    assert small.loss("neo_hookean", truth) < 1e-20
    assert small.loss("linear", small.first[1]) > 1e-4
    with pytest.raises(ValueError, match="There is no task 'glass'"):
        task("glass")


@pytest.fixture(scope="module")
def small():
    with jax.enable_x64(True):
        return task("elasticity", per_side=6, grid=14, steps=100, every=50)


def test_the_true_law_explains_single_steps_and_holds_from_fresh_starts_where_a_fit_does_not(x64, small):
    terms, coefficients = small.true_law()
    grammar = small.grammar()
    laws = ReplayProposer((grammar.additive(terms), grammar.additive(["I1", "J", "sqrt(J)"])))
    found = search(small.screening(snapshots=3), laws, batch=2, progress=False)
    np.testing.assert_allclose(found.best.y, coefficients, rtol=1e-6)
    assert found.trials[1].loss > 1e3 * found.best.loss
    assert small.same_energy(found.best.proposal, found.best.y) < 1e-8
    held = [small.verify(t.proposal, t.y, count=1) for t in found.trials]
    assert held[0].holds
    assert str(held[0]).startswith("the law holds: from fresh starts it is ")
    assert not held[1].holds
    assert str(held[1]).startswith("NOT the law")
    upside_down = small.verify(found.best.proposal, -np.asarray(found.best.y), count=1)
    assert str(upside_down) == "NOT the law: the body would not resist small strains"
    pressed = small.verify(found.best.proposal, np.asarray(found.best.y) * [1, 1.1, 1], count=1)
    assert "the undeformed body would be under stress" in str(pressed)


def test_without_the_truth_in_the_grammar_the_report_does_not_claim_it(x64, small):
    functions = tuple(f for f in small.grammar().functions if f != "log")
    proposer = GrammarProposer(small.grammar(functions=functions), parents=10)
    found = search(
        small.screening(snapshots=3), proposer, evaluations=256, batch=128, key=1, finalists=1, progress=False
    )
    assert "log" not in str(found.best.proposal)
    for trial in found.ranked(3):
        assert not small.verify(trial.proposal, trial.y, count=1).holds


def test_finalists_are_fitted_to_the_whole_trajectory(x64, small):
    terms, coefficients = small.true_law()
    trial = Trial(0, 0, small.grammar().additive(terms), 1.0, np.asarray(coefficients) * 1.02)
    problem = small.final_problem_of(trial)
    residuals = jax.jit(problem.residuals)
    before = jnp.sum(residuals(problem.start, problem.shared) ** 2)
    exact = jnp.sum(residuals(jnp.asarray(coefficients), problem.shared) ** 2)
    assert exact < 1e-20 < 1e-8 < before
    # The register program says the same.
    vm = small.problem_of(trial.proposal)
    same = jax.jit(vm.residuals)(jnp.asarray(problem.start), vm.data, vm.shared)
    np.testing.assert_allclose(same, residuals(problem.start, problem.shared), rtol=1e-8, atol=1e-12)


def test_verification_asks_for_double_precision():
    single = task("elasticity", per_side=3, grid=12, steps=4, every=2)
    with pytest.raises(ValueError, match="needs float64 for it"):
        single.verify(single.grammar().additive(["I1"]), [1.0])


TEXTBOOK = {
    "ethylene": (2.0, [1.0]),
    "butadiene": (1.2361, [0.8944, 0.4472, 0.8944]),
    "benzene": (2.0, [0.6667] * 6),
    "naphthalene": (1.2361, None),
}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_gaps_and_bond_orders_are_the_textbooks(x64, name):
    arrays = MOLECULES[name].arrays()
    e, order = jax.jit(spectrum)(arrays, np.full(len(MOLECULES[name].bonds), 1.397))
    gap, orders = TEXTBOOK[name]
    half = len(e) // 2
    assert float(e[half] - e[half - 1]) == pytest.approx(gap, abs=5e-5)
    if orders is None:
        # naphthalene: 1-2, 2-3, 1-9 and 9-10
        np.testing.assert_allclose(sorted({round(float(o), 4) for o in order}), [0.5182, 0.5547, 0.6032, 0.7246])
    else:
        np.testing.assert_allclose(order, orders, atol=5e-5)


def test_hypergradients_through_the_relaxation_are_central_differences(x64):
    arrays = MOLECULES["butadiene"].arrays()

    def gap(alpha):
        changed = {**arrays, "alpha": alpha}
        e, _ = spectrum(changed, relax(changed))
        return e[2] - e[1]

    alpha, h = np.array([0.1, -0.2, 0.3, 0.0]), 1e-5
    value, found = jax.jit(gap), jax.jit(jax.grad(gap))(alpha)
    wanted = [(value(alpha + step) - value(alpha - step)) / (2 * h) for step in h * np.eye(4)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


def test_relaxed_lengths_are_of_least_energy_and_level_orbitals_have_derivatives(x64):
    for name in ("butadiene", "benzene", "pyridine"):
        arrays = MOLECULES[name].arrays()

        @jax.jit
        def derivatives(arrays):
            lengths = relax(arrays, steps=200)
            of = lambda r: energy(arrays, r)
            return jax.grad(of)(lengths), jax.hessian(of)(lengths)

        slope, curvature = derivatives(arrays)
        assert np.abs(slope).max() < 1e-9
        assert np.linalg.eigvalsh(curvature).min() > 0
    # Benzene's HOMO is level with another orbital: bond orders are smooth all the same.
    arrays, h = MOLECULES["benzene"].arrays(), 1e-6
    order = jax.jit(lambda r: spectrum(arrays, r)[1])
    lengths = np.full(6, 1.397)
    found = jax.jit(jax.jacrev(order))(lengths)
    wanted = np.stack([(order(lengths + step) - order(lengths - step)) / (2 * h) for step in h * np.eye(6)], 1)
    np.testing.assert_allclose(found, wanted, atol=1e-8)


def test_a_molecule_is_found_and_relaxed_and_no_frame_twice(x64):
    target, size = 0.75, 8
    found = search(
        molecule_problem("gap", target, size),
        MoleculeProposer(size, "gap", target),
        evaluations=96,
        batch=32,
        progress=False,
    )
    assert len({t.proposal for t in found.trials}) == 96
    assert found.best.loss < 0.02**2 < found.trials[0].loss
    best = Molecule.from_text(found.best.proposal)
    arrays = best.arrays()
    lengths = relax(arrays, steps=400)
    np.testing.assert_allclose(found.best.y[: len(best.bonds)], lengths, atol=1e-5)
    value, slope = alchemical(best, "gap", size)
    assert (value - target) ** 2 == pytest.approx(found.best.loss, abs=1e-6)
    assert slope.shape == (len(best.atoms),)
    ring = Molecule("NCCCCC", ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0)))
    turned = Molecule("CCNCCC", ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0)))
    trial = Trial(0, 0, ring.to_text(), 0.1)
    children = MoleculeProposer(6).ask([trial], 40, jax.random.key(0))
    assert turned.to_text() not in children
    with pytest.raises(ValueError, match="one of homo, lumo, gap"):
        molecule_problem("colour", 1.0)
    with pytest.raises(ValueError, match="need both quantity and target"):
        MoleculeProposer(8, "gap")


def test_molecules_are_checked():
    assert Molecule.from_text("CCCC 0-1 1-2 2-3") == MOLECULES["butadiene"]
    for text, reason in (
        ("CX 0-1", "is none of C, N"),
        ("CCCC 0-1", "not one piece"),
        ("CC __import__", "two numbers"),
    ):
        with pytest.raises(ValueError, match=reason):
            Molecule.from_text(text)


def test_lengths_that_are_not_relaxed_have_no_loss():
    """Cyclobutadiene's square is level by symmetry: least squares stand there, .04 angstrom off Coulson's relation."""
    found = search(
        molecule_problem("gap", 1.0, size=8), ReplayProposer(("CCCC 0-1 0-3 1-2 2-3", "CCCC 0-1 1-2 2-3")),
        evaluations=2, progress=False,
    )  # fmt: skip
    assert [t.failed for t in found.trials] == [True, False]
