"""The scene of `benchmarks/discovery.py` in Warp: the same MLS-MPM step, neo-Hookean, two dimensions, slip walls."""

import numpy as np
import warp as wp

wp.config.quiet = True


@wp.func
def spline(f: float, i: int):
    if i == 0:
        return 0.5 * (1.5 - f) * (1.5 - f)
    if i == 1:
        return 0.75 - (f - 1.0) * (f - 1.0)
    return 0.5 * (f - 0.5) * (f - 0.5)


@wp.kernel
def to_grid(
    x: wp.array(dtype=wp.vec2),
    v: wp.array(dtype=wp.vec2),
    c: wp.array(dtype=wp.mat22),
    f: wp.array(dtype=wp.mat22),
    lame: wp.array(dtype=float),
    mass: float,
    volume: float,
    dt: float,
    n: int,
    masses: wp.array(dtype=float),
    momenta: wp.array(dtype=wp.vec2),
):
    p = wp.tid()
    grid = float(n)
    bx = int(x[p][0] * grid - 0.5)
    by = int(x[p][1] * grid - 0.5)
    fx = x[p][0] * grid - float(bx)
    fy = x[p][1] * grid - float(by)
    eye = wp.mat22(1.0, 0.0, 0.0, 1.0)
    tau = lame[0] * (f[p] * wp.transpose(f[p]) - eye) + lame[1] * wp.log(wp.determinant(f[p])) * eye
    affine = mass * c[p] - (dt * volume * 4.0 * grid * grid) * tau
    for i in range(3):
        for j in range(3):
            w = spline(fx, i) * spline(fy, j)
            apart = wp.vec2((float(i) - fx) / grid, (float(j) - fy) / grid)
            node = (bx + i) * n + by + j
            wp.atomic_add(masses, node, w * mass)
            wp.atomic_add(momenta, node, w * (mass * v[p] + affine * apart))


@wp.kernel
def on_grid(
    masses: wp.array(dtype=float),
    momenta: wp.array(dtype=wp.vec2),
    dt: float,
    n: int,
    margin: int,
    out: wp.array(dtype=wp.vec2),
):
    k = wp.tid()
    if masses[k] > 0.0:
        v = momenta[k] / masses[k] + wp.vec2(0.0, -9.8 * dt)
        i = k // n
        j = k - i * n
        a = v[0]
        b = v[1]
        if i < margin:
            a = wp.max(a, 0.0)
        if i > n - 1 - margin:
            a = wp.min(a, 0.0)
        if j < margin:
            b = wp.max(b, 0.0)
        if j > n - 1 - margin:
            b = wp.min(b, 0.0)
        out[k] = wp.vec2(a, b)


@wp.kernel
def from_grid(
    x: wp.array(dtype=wp.vec2),
    f: wp.array(dtype=wp.mat22),
    grid_v: wp.array(dtype=wp.vec2),
    dt: float,
    n: int,
    new_x: wp.array(dtype=wp.vec2),
    new_v: wp.array(dtype=wp.vec2),
    new_c: wp.array(dtype=wp.mat22),
    new_f: wp.array(dtype=wp.mat22),
):
    p = wp.tid()
    grid = float(n)
    bx = int(x[p][0] * grid - 0.5)
    by = int(x[p][1] * grid - 0.5)
    fx = x[p][0] * grid - float(bx)
    fy = x[p][1] * grid - float(by)
    v = wp.vec2(0.0, 0.0)
    c = wp.mat22(0.0, 0.0, 0.0, 0.0)
    for i in range(3):
        for j in range(3):
            near = spline(fx, i) * spline(fy, j) * grid_v[(bx + i) * n + by + j]
            v += near
            c += 4.0 * grid * grid * wp.outer(near, wp.vec2((float(i) - fx) / grid, (float(j) - fy) / grid))
    new_x[p] = x[p] + dt * v
    new_v[p] = v
    new_c[p] = c
    new_f[p] = f[p] + dt * c * f[p]


@wp.kernel
def mean_square(x: wp.array(dtype=wp.vec2), loss: wp.array(dtype=float)):
    p = wp.tid()
    wp.atomic_add(loss, 0, wp.dot(x[p], x[p]))


class Rollout:
    """Arrays of every step, the launches, and with `tape` their gradient by mu and lambda."""

    def __init__(self, simulation, start, steps, lame):
        self.simulation, self.steps, self.n = simulation, steps, len(start.x)
        of = lambda a, dtype: wp.array(np.asarray(a, np.float32), dtype=dtype, device="cpu", requires_grad=True)
        empty = lambda n, dtype: wp.zeros(n, dtype=dtype, device="cpu", requires_grad=True)
        first = (of(start.x, wp.vec2), of(start.v, wp.vec2), of(start.c, wp.mat22), of(start.f, wp.mat22))
        kinds = (wp.vec2, wp.vec2, wp.mat22, wp.mat22)
        self.states = [first, *(tuple(empty(self.n, k) for k in kinds) for _ in range(steps))]
        nodes = simulation.grid**2
        self.grids = [(empty(nodes, float), empty(nodes, wp.vec2), empty(nodes, wp.vec2)) for _ in range(steps)]
        self.lame, self.loss = of(lame, float), empty(1, float)

    def forward(self):
        """Positions after the last step (n, 2)."""
        s = self.simulation
        for grids in self.grids:
            for a in grids:
                a.zero_()
        self.loss.zero_()
        for (x, v, c, f), new, (m, mv, gv) in zip(self.states[:-1], self.states[1:], self.grids, strict=True):
            given = [x, v, c, f, self.lame, s.mass, s.volume, s.dt, s.grid, m, mv]
            wp.launch(to_grid, self.n, given, device="cpu")
            wp.launch(on_grid, s.grid**2, [m, mv, s.dt, s.grid, s.margin, gv], device="cpu")
            wp.launch(from_grid, self.n, [x, f, gv, s.dt, s.grid, *new], device="cpu")
        wp.launch(mean_square, self.n, [self.states[-1][0], self.loss], device="cpu")
        return self.states[-1][0].numpy()

    def gradient(self):
        """Of the sum of squared positions by (mu, lambda)."""
        tape = wp.Tape()
        with tape:
            self.forward()
        tape.backward(self.loss)
        found = self.lame.grad.numpy().copy()
        tape.zero()
        return found
