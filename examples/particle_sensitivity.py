"""How the equilibrium of a packing of soft discs moves when half of the discs grow, by implicit differentiation.

Small discs have the diameter 1, large ones the diameter x. Overlapping discs repel each other, in a periodic box:

    y*(x) = argmin over positions y of  E(x, y) = sum over pairs of  2/5 (1 - r_ij / s_ij)^(5/2)  where r_ij < s_ij,

with s_ij the mean of the two diameters. FIRE finds y*, whatever its inside; the derivative dy*/dx = -E_yy^+ E_yx comes
from the condition E_y(x, y*) = 0 alone. Unrolling, that is differentiating the minimiser's steps, is right only in the
limit: far from it the derivative of the path is not the derivative of its end.

E does not change when all discs are shifted together, so E_yy is singular. Forces sum to zero, hence E_yx is orthogonal
to these two directions, and `linear.MINRES` from a cold start gives the solution of least norm: the one that holds the
centre of mass still, as the minimiser does. No disc needs to be pinned, and no damping biases the answer. In reverse
mode the right-hand side is the caller's and may be anything, so its share along the two directions is taken out first.
A disc without contacts (a rattler) would add two zero modes more; the density is chosen so high that there is none.

    python examples/particle_sensitivity.py
    python examples/particle_sensitivity.py --particles 60 --seed 2
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import implicit, linear

TOLERANCE, MAX_STEPS = 1e-13, 50_000


def solve_at_rest(matvec, b):
    """The solution of E_yy u = b of least norm: MINRES, once the shift of the whole packing is taken out of b."""
    return linear.MINRES(tol=1e-12, max_steps=2000)(matvec, b - b.mean(axis=0))[0]


def diameters(x, count):
    """The first half is small."""
    return jnp.where(jnp.arange(count) < count // 2, 1.0, x)


def energy(x, y, box):
    """E(x, y) of positions y, (n, 2), in a periodic square of side `box`."""
    first, second = np.triu_indices(len(y), 1)
    apart = y[first] - y[second]
    apart = apart - box * jnp.round(apart / box)
    size = diameters(x, len(y))
    overlap = 1 - jnp.sqrt(jnp.sum(apart**2, axis=1)) / ((size[first] + size[second]) / 2)
    touching = overlap > 0
    # The inner `where` keeps the third derivative of the 5/2-th power, infinite at zero, out of pairs that are apart.
    return 0.4 * jnp.sum(jnp.where(touching, jnp.where(touching, overlap, 1) ** 2.5, 0))


def forces(y, x, box):
    return -jax.grad(energy, argnums=1)(x, y, box)


def fire_start(y):
    return y, jnp.zeros_like(y), jnp.asarray(0.1), jnp.asarray(0.1), jnp.asarray(0)


def fire_step(gradient, state):
    """One step of FIRE: molecular dynamics that steers towards the force and stops dead when it runs uphill.

    Bitzek, Koskinen, Gaehler, Moseler and Gumbsch, "Structural Relaxation Made Simple", Phys. Rev. Lett. 2006.
    """
    y, velocity, dt, mix, downhill = state
    force = -gradient(y)
    velocity = velocity + dt * force
    going_down = jnp.vdot(force, velocity) > 0
    speed, size = jnp.sqrt(jnp.vdot(velocity, velocity)), jnp.sqrt(jnp.vdot(force, force))
    steered = (1 - mix) * velocity + mix * speed * force / jnp.where(size > 0, size, 1)
    downhill = jnp.where(going_down, downhill + 1, 0)
    faster = downhill > 5
    dt = jnp.where(going_down, jnp.where(faster, jnp.minimum(1.1 * dt, 1.0), dt), 0.5 * dt)
    mix = jnp.where(going_down, jnp.where(faster, 0.99 * mix, mix), 0.1)
    velocity = jnp.where(going_down, steered, 0)
    return y + dt * velocity, velocity, dt, mix, downhill


def minimise(lower, x, y):
    """FIRE until no force exceeds the tolerance: the lower solver `(lower, x, y) -> y`, never differentiated."""
    gradient = jax.grad(lambda y: lower(x, y))

    def unfinished(carry):
        (y, *_), k = carry
        return (k < MAX_STEPS) & (jnp.abs(gradient(y)).max() > TOLERANCE)

    (y, *_), _ = jax.lax.while_loop(unfinished, lambda c: (fire_step(gradient, c[0]), c[1] + 1), (fire_start(y), 0))
    return y


equilibrium = implicit.argmin(energy, minimise, linear_solver=solve_at_rest)  # (x, start, box) -> y*(x)


def fire_path(x, start, box, steps):
    """The iterates of `steps` steps of FIRE, to be unrolled."""
    gradient = jax.grad(lambda y: energy(x, y, box))
    return jax.lax.scan(lambda s, _: (fire_step(gradient, s),) * 2, fire_start(start), length=steps)[1][0]


def descent_path(x, start, box, steps):
    """The iterates of gradient descent."""
    gradient = jax.grad(lambda y: energy(x, y, box))
    return jax.lax.scan(lambda y, _: (y - 0.5 * gradient(y),) * 2, start, length=steps)[1]


def along(fn, x):
    """fn(x) and its derivative: one tangent, in forward mode."""
    return jax.jvp(fn, (x,), (jnp.ones_like(x),))


def error_curves(path, x, start, box, steps, h):
    """Errors of the unrolled and of the implicit derivative after k steps, for k on a logarithmic grid.

    The truth is the central difference of the minimum in whose basin the path ends, minimised again at x + h and x - h.
    """
    ys, unrolled = jax.jit(lambda x: along(lambda x: path(x, start, box, steps), x))(x)
    end = equilibrium(x, ys[-1], box)
    truth = central_difference(lambda x: equilibrium(x, end, box), x, h)
    ks = np.unique(np.round(np.geomspace(10, steps, 60)).astype(int)) - 1
    at = lambda y: implicit.root_jvp(forces, y, (x, box), (jnp.ones_like(x), jnp.zeros_like(box)), solve_at_rest)
    implicit_at = jax.jit(jax.vmap(at))(ys[ks])
    relative = lambda d: np.asarray(jnp.linalg.norm(d - truth, axis=(1, 2)) / jnp.linalg.norm(truth))
    force = jax.vmap(lambda y: jnp.linalg.norm(forces(y, x, box)))(ys[ks])
    return {
        "steps": ks + 1,
        "unrolled": relative(unrolled[ks]),
        "implicit": relative(implicit_at),
        "force": np.asarray(force),
    }


def central_difference(fn, x, h):
    fn = jax.jit(fn)
    return (fn(x + h) - fn(x - h)) / (2 * h)


def study(particles, ratio, density, seed, steps, h):
    """All numbers of the example, in float64 (which must be on)."""
    x = jnp.asarray(ratio)
    area = np.pi / 4 * np.sum(np.asarray(diameters(ratio, particles)) ** 2)
    box = jnp.asarray(np.sqrt(area / density))
    start = box * jax.random.uniform(jax.random.key(seed), (particles, 2))
    y = jax.jit(equilibrium)(x, start, box)

    def solution(x):
        return equilibrium(x, y, box)

    def total(x):
        return energy(x, solution(x), box)

    slope = jax.grad(total)
    direction = jax.jit(lambda x: along(solution, x)[1])(x)
    difference = central_difference(solution, x, h)
    hessian = jax.hessian(lambda flat: energy(x, flat.reshape(y.shape), box))(y.ravel())
    mixed = jax.jacfwd(lambda x: jax.grad(energy, argnums=1)(x, y, box))(x)
    dense = -(jnp.linalg.pinv(hessian, rtol=1e-9, hermitian=True) @ mixed.ravel()).reshape(y.shape)
    return {
        "y": np.asarray(y),
        "box": float(box),
        "force": float(jnp.abs(forces(y, x, box)).max()),
        "spectrum": np.linalg.eigvalsh(np.asarray(hessian)),
        "direction": np.asarray(direction),
        "direction error": (
            float(jnp.linalg.norm(direction - dense) / jnp.linalg.norm(dense)),
            float(jnp.linalg.norm(direction - difference) / jnp.linalg.norm(difference)),
        ),
        "drift": float(jnp.abs(direction.mean(0)).max()),
        "dE/dx": (float(jax.jit(slope)(x)), float(central_difference(total, x, h))),
        "d2E/dx2": (float(jax.jit(jax.grad(slope))(x)), float(central_difference(slope, x, h))),
        "curves": {
            "FIRE from a random start": error_curves(fire_path, x, start, box, steps, h),
            "FIRE from y*": error_curves(fire_path, x, y, box, steps, h),
            "gradient descent from y*": error_curves(descent_path, x, y, box, steps, h),
        },
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=30)
    parser.add_argument("--ratio", type=float, default=1.4, help="x, the diameter of the large discs")
    parser.add_argument("--density", type=float, default=1.0, help="area of all discs over the area of the box")
    parser.add_argument("--steps", type=int, default=2000, help="length of the unrolled runs")
    parser.add_argument("--difference", type=float, default=3e-5, help="h of the central differences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("particle_sensitivity.png"))
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    jax.config.update("jax_enable_x64", True)

    found = study(args.particles, args.ratio, args.density, args.seed, args.steps, args.difference)
    modes, force = found["spectrum"], found["force"]
    zero = int(np.sum(modes < 1e-9 * modes[-1]))
    print(f"{args.particles} soft discs, half of them with the diameter x = {args.ratio}; largest force {force:.1e}")
    print(f"  Hessian: {zero} zero modes (2 are translations), the others from {modes[zero]:.3g} to {modes[-1]:.3g}")
    against_dense, against_difference = found["direction error"]
    print("  dy*/dx by implicit differentiation, relative error")
    print(f"    against the dense pseudo-inverse of the Hessian {against_dense:.1e}")
    print(f"    against central differences                     {against_difference:.1e}")
    print(f"  the centre of mass moves by {found['drift']:.1e}")
    for name in ("dE/dx", "d2E/dx2"):
        print("  {:<7} {:.8f}, by central differences {:.8f}".format(name, *found[name]))
    for name, curve in found["curves"].items():
        print(f"\n  relative error of dy*/dx after k steps of {name}")
        print(f"  {'k':>8} {'|force|':>9} {'unrolled':>9} {'implicit':>9}")
        for i in range(0, len(curve["steps"]), 7):
            row = [curve[key][i] for key in ("force", "unrolled", "implicit")]
            print(f"  {curve['steps'][i]:>8}" + "".join(f" {value:9.1e}" for value in row))
    draw(args.out, found, args.ratio)
    print(f"\n  picture: {args.out}; {time.perf_counter() - began:.1f} s in all")
    return found


def draw(path, found, ratio):
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    box, count = found["box"], len(found["y"])
    y, size = found["y"] % box, np.asarray(diameters(ratio, count))
    shifts = box * np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)])
    images = (y[None] + shifts[:, None]).reshape(-1, 2)
    sizes, colors = np.tile(size, 9), np.tile(np.where(np.arange(count) < count // 2, "C0", "C1"), 9)
    discs = EllipseCollection(
        sizes,
        sizes,
        0 * sizes,
        units="xy",
        offsets=images,
        offset_transform=left.transData,
        facecolors=colors,
        alpha=0.35,
    )
    left.add_collection(discs)
    arrows = np.tile(found["direction"], (9, 1))
    left.quiver(*images.T, *arrows.T, angles="xy", scale_units="xy", scale=1, width=0.004, zorder=3)
    left.set(xlim=(0, box), ylim=(0, box), aspect="equal", xticks=[], yticks=[])
    left.set_title("equilibrium, and dy*/dx (where each disc moves\nas the orange ones grow)")
    for (name, curve), color in zip(found["curves"].items(), ("C2", "C4", "C3"), strict=True):
        right.loglog(curve["steps"], curve["unrolled"], color=color, label=f"unrolled {name}")
        if "random" in name:
            right.loglog(
                curve["steps"], curve["implicit"], color=color, ls="--", label="implicit, at the same iterates"
            )
    right.loglog(curve["steps"], curve["implicit"], color="k", ls="--", label="implicit, at y*")
    right.axhline(1, color="C7", lw=0.8)
    right.set(
        xlabel="steps of the minimiser", ylabel="relative error", title="error of dy*/dx against central differences"
    )
    right.set_ylim(bottom=1e-11)
    right.legend(fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
