"""Discovery: one program for all laws against a compile for each, the simulator against Warp, LM against Adam.

    python benchmarks/discovery.py
    python benchmarks/discovery.py --only laws simulator

Warp runs on its CPU back-end where it is installed; `step` holds one step against mpm-pytorch's where that and torch
are. All on one core in one process.
"""

from __future__ import annotations

import time

import _harness
import numpy as np


def laws(options):
    """256 laws, their coefficients fitted to single steps: vmapped register programs against a compile for each law."""
    import jax
    import jax.numpy as jnp

    from bilevel import search
    from bilevel.applications.discovery import energy_stress, task
    from bilevel.lower import LevenbergMarquardt
    from bilevel.proposers import GrammarProposer, ReplayProposer

    jax.config.update("jax_enable_x64", True)
    hidden = task("elasticity", per_side=options.per_side)
    proposer, problem_of = GrammarProposer(hidden.grammar()), hidden.screening()
    draw = lambda seed: proposer.ask([], options.laws, jax.random.key(seed))
    ours = lambda seed: search(
        problem_of, ReplayProposer(tuple(draw(seed))), evaluations=options.laws, batch=options.laws, progress=False
    )
    _, first = _harness.measured(lambda: ours(0))
    times = _harness.Times()
    for seed in range(1, 1 + options.rounds):
        with times.measured():
            found = ours(seed)

    # The same fits, each law as JAX code of its own.
    states, change, scale = problem_of(draw(0)[0]).shared
    sim, solver = hidden.simulation, LevenbergMarquardt()

    def alone(law):
        def pushed(state, stress):
            weights = sim.weights(state.x)
            masses, momenta = sim.to_grid(state._replace(v=0 * state.v, c=0 * state.c), stress, weights)
            v = momenta / jnp.where(masses > 1e-12 * sim.mass, masses, 1.0)[:, None]
            return (v[weights[0]] * weights[1][..., None]).sum(1)

        @jax.jit
        def fit(states, change, scale):
            def column(k):
                unit = jnp.zeros(len(law.terms)).at[k].set(1.0)
                stress = energy_stress(lambda a, b: law.evaluate({"I1": a, "J": b}, unit))
                return jax.vmap(lambda s: pushed(s, stress(s.f)))(states) * scale

            columns = jnp.stack([column(k) for k in range(len(law.terms))])
            residuals = lambda y: jnp.tensordot(y, columns, 1) - change * scale
            return solver.fit(residuals, jnp.zeros(len(law.terms))).loss

        return float(fit(states, change, scale))

    chosen = [t for t in found.trials if not t.failed][: options.alone]
    each, apart = _harness.Times(), []
    for trial in chosen:
        with each.measured():
            loss = alone(trial.proposal)
        apart.append(abs(loss - trial.loss) / max(trial.loss, 1e-12))
    scaled = options.laws * np.mean(each.cpu)
    print(f"\n{options.laws} laws of an energy, coefficients fitted (CPU seconds)")
    _harness.table(
        ("", "seconds", "ratio"),
        ("one program for all, after its compile", times.median(), times.median() / scaled),
        ("one program for all, compile included", first.cpu[0], first.cpu[0] / scaled),
        (f"a compile for each (mean of {len(chosen)}, times {options.laws})", scaled, 1.0),
    )
    print(f"losses of the two agree to {np.median(apart):.1e} (median), {max(apart):.1e} (worst)")


def simulator(options):
    """Forward and gradient per particle and step, float32, against Warp's CPU back-end on the same scene."""
    import jax
    import jax.numpy as jnp

    from bilevel.applications.discovery import ELASTIC, Simulation, block, lame

    jax.config.update("jax_enable_x64", False)
    simulation, start = block(Simulation(grid=32), options.side, 0.4, velocity=(0.5, -1.5), spin=3.0)
    parameters = {"E": jnp.float32(2e5), "nu": jnp.float32(0.28)}

    def positions(p):
        return simulation.rollout(start, options.steps, lambda f: ELASTIC["neo_hookean"](f, p))[0].x

    forward, gradient = jax.jit(positions), jax.jit(jax.grad(lambda p: jnp.sum(positions(p) ** 2)))
    calls = {"ours": lambda: forward(parameters), "ours gradient": lambda: gradient(parameters)}
    try:
        from _warp_mpm import Rollout

        theirs = Rollout(simulation, start, options.steps, [float(v) for v in lame(parameters)])
        calls |= {"warp": theirs.forward, "warp gradient": theirs.gradient}
    except ImportError:
        print("warp is not installed: left out")
    times = _harness.interleaved(calls, options.rounds)
    unit = 1e9 / (len(start.x) * options.steps)
    print(f"\nMLS-MPM, {len(start.x)} particles, {options.steps} steps, float32: nanoseconds per particle and step")
    rows = [(name, t.median("cpu", unit), t.median("wall", unit)) for name, t in times.items()]
    _harness.table(("", "CPU", "wall"), *rows)
    if "warp" in times:
        print(f"ours over warp, CPU: forward {_harness.ratio(times['ours'], times['warp'])}, ", end="")
        print(f"gradient {_harness.ratio(times['ours gradient'], times['warp gradient'])}")
        away = _harness.difference(forward(parameters), theirs.forward())
        of_lame = lambda pair: jnp.sum(positions(_young(pair)) ** 2)
        ours = np.asarray(jax.grad(of_lame)(jnp.asarray(lame(parameters))))
        print(f"positions agree to {away:.1e}, gradients by mu and lambda to ", end="")
        print(f"{_harness.difference(ours, theirs.gradient()):.1e} (relative)")


def _young(pair):
    mu, lam = pair
    return {"E": mu * (3 * lam + 2 * mu) / (lam + mu), "nu": lam / (2 * (lam + mu))}


def step(options):
    """One step in 3-D against mpm-pytorch's, from the same random state, without stress and with it.

    That package takes the stress and F by the gradients of the B-splines, as MPM before MLS-MPM does: positions,
    velocities and their affine part are the same without stress alone, and F is never quite.
    """
    import jax
    import jax.numpy as jnp

    from bilevel.applications.discovery import ELASTIC, Simulation, State, block

    try:
        import torch
        from mpm_pytorch.mpm_solver import MPMSolver
    except ImportError as error:
        print(f"no step of mpm-pytorch: {error}")
        return
    jax.config.update("jax_enable_x64", False)
    side, random = 0.4, np.random.default_rng(0)
    simulation, start = block(Simulation(3, grid=16, walls="none", fastest=1e3), 8, side, velocity=(1.0, -0.5, -0.75))
    n, noise = len(start.x), lambda *shape: random.normal(size=shape).astype(np.float32)
    v, c, f = np.asarray(start.v) + noise(n, 3), noise(n, 3, 3), np.eye(3, dtype=np.float32) + 0.05 * noise(n, 3, 3)
    state = State(*map(jnp.asarray, (start.x, v, c, f)))
    law = lambda f: ELASTIC["neo_hookean"](f, {"E": 2e5, "nu": 0.28})
    rows = []
    for name, stress in (("without stress", lambda f: 0 * f), ("neo-Hookean", law)):
        theirs = MPMSolver(
            torch.tensor(np.asarray(start.x)),
            num_grids=simulation.grid,
            dt=simulation.dt,
            size=[side] * 3,
            device="cpu",
        )
        given = [torch.tensor(np.asarray(a)) for a in (*state, stress(state.f))]
        pairs = zip(simulation.step(state, stress), theirs(*given), strict=True)
        rows.append((name, *(f"{_harness.difference(ours, np.asarray(other)):.1e}" for ours, other in pairs)))
    print(f"\none step of {n} particles in 3-D, float32: relative difference from mpm-pytorch")
    _harness.table(("", "x", "v", "C", "F"), *rows)


def recovery(options):
    """E and nu of a neo-Hookean block from a trajectory: Levenberg-Marquardt against 30 epochs of Adam."""
    import jax
    import jax.numpy as jnp
    import optax

    from bilevel.applications.discovery import task

    jax.config.update("jax_enable_x64", False)
    true = {"E": 2e5, "nu": 0.2815}
    hidden = task("elasticity", per_side=options.side, grid=24, steps=500, parameters={"elastic": true})
    start = {"E": float(np.exp(10)), "nu": float(0.49 / (1 + np.exp(1)))}
    rows = []
    for steps in (6, 8, 10):
        began = time.process_time()
        fit = hidden.fit("neo_hookean", start, steps=steps)
        jax.block_until_ready(fit.loss)
        rows.append((f"LM, {steps} iterations", fit.y["E"], fit.y["nu"], fit.loss, time.process_time() - began))
    of_u = lambda u: {"E": jnp.exp(u[0]), "nu": 0.49 * jax.nn.sigmoid(u[1])}
    shared = hidden.starts()

    @jax.jit
    def step(u, state, shared):
        loss = lambda u: jnp.sum(hidden.residuals_of(*hidden.named("neo_hookean", of_u(u)), shared) ** 2)
        value, slope = jax.value_and_grad(loss)(u)
        updates, state = adam.update(slope, state)
        return optax.apply_updates(u, updates), state, value

    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-2))  # the paper's
    u, began = jnp.array([10.0, -1.0]), time.process_time()
    state = adam.init(u)
    for _ in range(30):
        u, state, value = step(u, state, shared)
    p = of_u(u)
    rows.append(("Adam, 30 epochs", p["E"], p["nu"], value, time.process_time() - began))
    print(f"\nrecovery of E = {true['E']:g}, nu = {true['nu']} from {start['E']:.3g}, {start['nu']:.3f}; float32")
    table = [(name, *(float(v) for v in values)) for name, *values in rows]
    errors = [f"{max(abs(e / true['E'] - 1), abs(nu / true['nu'] - 1)):.1e}" for _, e, nu, *_ in table]
    table = [(n, f"{e:.6g}", f"{nu:.5f}", r, f"{v:.1e}", s) for (n, e, nu, v, s), r in zip(table, errors, strict=True)]
    _harness.table(("", "E", "nu", "worst relative error", "loss", "CPU s with compile"), *table)


def main():
    parser = _harness.arguments(__doc__, rounds=5)
    parts = {"laws": laws, "simulator": simulator, "step": step, "recovery": recovery}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--laws", type=int, default=256)
    parser.add_argument("--alone", type=int, default=16, help="laws that are compiled one by one")
    parser.add_argument("--per-side", type=int, default=12, help="particles of the laws' scene")
    parser.add_argument("--side", type=int, default=32, help="particles of the simulator's scene")
    parser.add_argument("--steps", type=int, default=100)
    options = _harness.start(parser, "warp-lang", laws=16, alone=2, per_side=5, side=8, steps=10)
    for name in options.only:
        parts[name](options)


if __name__ == "__main__":
    main()
