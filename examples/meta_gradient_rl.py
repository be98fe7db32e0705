"""Meta-gradient reinforcement learning: a policy is trained below, and what its training is told is learnt above.

    F(x, y_T(x)) = - the return of the policy y_T, as the task counts it
    y_{t+1}      = y_t - d/dy f(x, y_t; trajectories drawn with the policy y_t),    t = 0, ..., T - 1

    f(x, y) = exp(rate) (- mean over episodes of sum_t log pi_y(a_t | s_t) A_t - exp(entropy) sum_t H(pi_y(. | s_t)))
    A_t     = G_t - its mean over the episodes,    G_t = r_t + r_x(s_t, a_t) + sigmoid(discount) G_{t+1}

The upper variable x holds the learning rate, the weight of the entropy and the discount, and, where it is asked for,
an intrinsic reward r_x, of which the policy's training knows and the return does not. A training of T updates is
differentiated as a whole; it begins anew, with fresh draws, at every outer step, in several copies (lifetimes).

What is differentiated is the training with its draws: the trajectories that were seen are constants. That they would
have been others with another x is left out, as it is in the papers: Xu, van Hasselt and Silver, "Meta-Gradient
Reinforcement Learning", NeurIPS 2018, differentiate the update in the discount (and lambda, for which their learner has
a critic; this one has the mean of the batch), and Zheng, Oh and Singh, "On Learning Intrinsic Rewards for Policy
Gradient Methods", NeurIPS 2018, in an intrinsic reward. Both take one update at a time, along one long life; whole
trainings stand here in their place, and `--last K` takes the last K updates alone.

Two tasks: a way through a grid with its only reward at the end (a table; the return above is exact, solved backwards),
and balancing a pole on a cart, where it is estimated from fresh episodes. `--decoy .3` puts a smaller reward near the
start.

    python examples/meta_gradient_rl.py            # under five minutes on two cores
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, data, lower, run, solvers
from bilevel.hypergradients import Unrolled
from bilevel.keys import as_step_key

FIXED = {"rate": np.log(2.0), "entropy": np.log(0.01), "discount": 3.0}  # sigmoid(3) = .95
GRID = {"rate": np.log([0.5, 2.0, 8.0]), "entropy": np.log([1e-3, 1e-2, 1e-1]), "discount": np.array([1.5, 3.0, 6.0])}


class Task(NamedTuple):
    """An episode's rules, all functions pure; `observe` is what policy and intrinsic reward are given."""

    horizon: int
    actions: int
    reset: Callable[[jax.Array], Any]
    step: Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array, jax.Array]]  # -> state, reward, whether it ended
    observe: Callable[[Any], jax.Array]
    policy: Callable[[jax.Array], Any]  # a key -> parameters
    logits: Callable[[Any, jax.Array], jax.Array]
    intrinsic: Callable[[Any, jax.Array, jax.Array], jax.Array]  # its parameters, observation, action
    no_intrinsic: Callable[[], Any]
    exact: Callable[[Any], jax.Array] | None = None  # the return of a policy's parameters, where it can be computed


def drawn(task, y, key, episodes):
    """Episodes of a policy: observations, actions, rewards and whether a step was still within, (horizon, episodes)."""
    y = jax.lax.stop_gradient(y)
    first, along = jax.random.split(key)
    state = jax.vmap(task.reset)(jax.random.split(first, episodes))

    def step(carry, key):
        state, alive = carry
        choose, move = jax.random.split(key)
        seen = jax.vmap(task.observe)(state)
        action = jax.random.categorical(choose, task.logits(y, seen))
        new, reward, ended = jax.vmap(task.step)(state, action, jax.random.split(move, episodes))
        return (new, alive & ~ended), (seen, action, reward * alive, alive)

    keys = jax.random.split(along, task.horizon)
    return jax.lax.scan(step, (state, jnp.ones(episodes, bool)), keys)[1]


def chosen(task, y, seen, actions):
    """(the logarithms of the probabilities of what was done, the entropy of what could have been)."""
    logs = jax.nn.log_softmax(task.logits(y, seen))
    taken = jnp.take_along_axis(logs, actions[..., None], -1)[..., 0]
    return taken, -jnp.sum(jnp.exp(logs) * logs, -1)


def returns(rewards, discount):
    """G_t = r_t + discount G_{t+1}."""
    back = lambda later, reward: (reward + discount * later,) * 2
    return jax.lax.scan(back, jnp.zeros(rewards.shape[1:]), rewards, reverse=True)[1]


def surrogate(taken, after, alive):
    """A number whose derivative is that of minus the expected return: the policy gradient, the batch's mean as
    baseline."""
    mean = jnp.sum(after * alive, 1, keepdims=True) / jnp.maximum(alive.sum(1, keepdims=True), 1)
    return -jnp.sum(taken * (after - mean) * alive) / taken.shape[1]


def training_loss(task, episodes):
    """f: of all lifetimes, which share nothing but x."""

    def one(x, y, key):
        seen, actions, rewards, alive = drawn(task, y, key, episodes)
        taken, entropy = chosen(task, y, seen, actions)
        rewards = rewards + task.intrinsic(x["intrinsic"], seen, actions) * alive if "intrinsic" in x else rewards
        gained = surrogate(taken, returns(rewards, jax.nn.sigmoid(x["discount"])), alive)
        return jnp.exp(x["rate"]) * (gained - jnp.exp(x["entropy"]) * jnp.sum(entropy * alive) / episodes)

    def loss(x, ys, batch):
        keys = jax.random.split(batch[1].random, len(jax.tree.leaves(ys)[0]))
        return jnp.sum(jax.vmap(lambda y, key: one(x, y, key))(ys, keys))

    return loss


def minus_return(task, episodes):
    """F: exact where the task has it, else the mean over fresh episodes with the policy gradient for derivative."""

    def one(y, key):
        if task.exact is not None:
            return -task.exact(y)
        seen, actions, rewards, alive = drawn(task, y, key, episodes)
        slope = surrogate(chosen(task, y, seen, actions)[0], returns(rewards, 1.0), alive)
        return slope - jax.lax.stop_gradient(slope) - jnp.sum(rewards) / episodes

    def loss(x, ys, batch):
        keys = jax.random.split(batch[1].random, len(jax.tree.leaves(ys)[0]))
        return jnp.mean(jax.vmap(one)(ys, keys))

    return loss


# ---------------------------------------------------------------- two tasks


def grid(decoy=0.0, side=6, horizon=24, slip=0.1):
    """From corner to corner of a square, where a reward of 1 ends the episode; a decoy along the edge may too."""
    moves = np.array([[0, 1], [0, -1], [1, 0], [-1, 0]])
    places = np.stack(np.divmod(np.arange(side * side), side), 1)
    to = np.clip(places[:, None] + moves, 0, side - 1) @ [side, 1]  # (states, actions)
    reward = jnp.zeros(side * side).at[side // 2].set(decoy).at[-1].set(1.0)
    to, ends = jnp.asarray(to, jnp.int32), reward > 0
    onto = jax.nn.one_hot(to, side * side)
    moved = (1 - slip) * onto + slip * onto.mean(1, keepdims=True)  # (states, actions, next states)

    def step(state, action, key):
        slips, other = jax.random.split(key)
        random = jax.random.randint(other, (), 0, 4)
        new = to[state, jnp.where(jax.random.bernoulli(slips, slip), random, action)]
        return new, reward[new], ends[new]

    def exact(y):
        probabilities = jax.nn.softmax(y)
        gain = moved @ reward
        back = lambda value, _: (jnp.sum(probabilities * (gain + moved @ (value * ~ends)), 1), None)
        return jax.lax.scan(back, jnp.zeros(side * side), None, length=horizon)[0][0]

    return Task(
        horizon=horizon,
        actions=4,
        reset=lambda key: jnp.zeros((), jnp.int32),
        step=step,
        observe=lambda state: state,
        policy=lambda key: jnp.zeros((side * side, 4)),
        logits=lambda y, seen: y[seen],
        intrinsic=lambda r, seen, actions: r[seen, actions],
        no_intrinsic=lambda: jnp.zeros((side * side, 4)),
        exact=exact,
    )


def pole(horizon=100, hidden=16):
    """The usual cart with a pole, pushed to the left or the right; 1 / horizon for every step that the pole stands."""
    gravity, cart, mass, half, push, tau = 9.8, 1.0, 0.1, 0.5, 10.0, 0.04

    def step(state, action, key):
        _, speed, angle, turn = state
        force = jnp.where(action == 1, push, -push)
        shared = (force + mass * half * turn**2 * jnp.sin(angle)) / (cart + mass)
        bend = gravity * jnp.sin(angle) - jnp.cos(angle) * shared
        spin = bend / (half * (4 / 3 - mass * jnp.cos(angle) ** 2 / (cart + mass)))
        push_back = shared - mass * half * spin * jnp.cos(angle) / (cart + mass)
        new = state + tau * jnp.stack([speed, push_back, turn, spin])
        return new, jnp.float32(1 / horizon), (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > 0.21)

    def policy(key):
        return {"hidden": jax.random.normal(key, (4, hidden)) / 2, "out": jnp.zeros((hidden, 2))}

    def intrinsic(r, seen, actions):
        sides = 2.0 * actions[..., None] - 1
        return (jnp.concatenate([seen**2, sides * seen], -1) @ r) / horizon

    return Task(
        horizon=horizon,
        actions=2,
        reset=lambda key: jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05),
        step=step,
        observe=lambda state: state * jnp.array([0.4, 0.5, 5.0, 0.5]),
        policy=policy,
        logits=lambda y, seen: jnp.tanh(seen @ y["hidden"]) @ y["out"],
        intrinsic=intrinsic,
        no_intrinsic=lambda: jnp.zeros(8),
    )


# ---------------------------------------------------------------- what is compared


class Study:
    """Trainings of a task: `steps` updates of `episodes` episodes each, in `lifetimes` copies."""

    def __init__(self, task, steps, episodes, lifetimes):
        self.task, self.steps, self.lifetimes = task, steps, lifetimes
        self.problem = Problem(
            upper=minus_return(task, 8 * episodes),
            lower=training_loss(task, episodes),
            upper_data=data.Keyed(),
            lower_data=data.Keyed(),
        )
        self.training = lower.GradientDescent(1.0, steps)
        self.after = jax.jit(self._after)

    def start(self, key):
        """Untrained policies, one per lifetime."""
        return jax.vmap(self.task.policy)(jax.random.split(key, self.lifetimes))

    def point(self, intrinsic=False, **values):
        """An upper variable."""
        x = {name: jnp.float32(value) for name, value in (FIXED | values).items()}
        return x | {"intrinsic": self.task.no_intrinsic()} if intrinsic else x

    def _after(self, x, seed):
        """The return after each tenth of a training from scratch, of draws that no other seed has; mean of copies."""
        key = as_step_key(jax.random.fold_in(jax.random.key(17), seed))
        upper = self.problem.levels(key).upper
        part = lower.GradientDescent(1.0, self.steps // 10)

        def tenth(state, k):
            piece = data.as_step_key(key.base, k)
            state = part(self.problem.levels(piece).lower, x, state)
            return state, -upper(x, state.y)

        return jax.lax.scan(tenth, part.init(self.start(key.random)), jnp.arange(10, dtype=jnp.uint32))[1]

    def learnt(self, x, seed, outer, rate, last=None):
        """x after `outer` steps along the metagradient of whole trainings (of their last updates)."""
        estimator = Unrolled(last=last, checkpoint="sqrt" if last is None else "all")
        # Some draws have derivatives many orders of magnitude above the others': clipped, they are one among them.
        rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, outer)))
        solver = solvers.HypergradientDescent(estimator, self.training, rule, warm_start=False)
        state, metrics = run(self.problem, solver, x, self.start(jax.random.key(seed)), outer, key=seed)
        return state.x, -np.asarray(metrics["upper_loss"])

    def best_of_grid(self, seed):
        """The fixed numbers with the best return after a training, and how many were tried."""
        points = [self.point(**dict(zip(GRID, at, strict=True))) for at in itertools.product(*GRID.values())]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
        found = jax.jit(jax.vmap(lambda x: self._after(x, seed)[-1]))(stacked)
        return points[int(np.argmax(found))], len(points)


def described(x):
    """The numbers of an upper variable in a few words."""
    rate, entropy, discount = np.exp(x["rate"]), np.exp(x["entropy"]), jax.nn.sigmoid(x["discount"])
    return f"rate {rate:.2g}, entropy {entropy:.2g}, discount {discount:.3f}"


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=("grid", "pole"), default=["grid", "pole"])
    parser.add_argument("--outer", type=int, default=30, help="outer steps, one training of all lifetimes each")
    parser.add_argument("--steps", type=int, default=30, help="updates of a training")
    parser.add_argument("--episodes", type=int, default=8, help="episodes per update")
    parser.add_argument("--lifetimes", type=int, default=4)
    parser.add_argument("--last", type=int, default=10, help="updates that the truncated line differentiates")
    parser.add_argument("--decoy", type=float, default=0.0, help="a smaller reward near the start of the grid")
    parser.add_argument("--rate", type=float, default=0.1, help="of Adam on x, falling to zero")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("meta_gradient_rl.png"))
    args = parser.parse_args(args)
    began, found = time.perf_counter(), {}

    for name in args.tasks:
        study = Study(grid(args.decoy) if name == "grid" else pole(), args.steps, args.episodes, args.lifetimes)
        rows, paths, learnt = {}, {}, {}
        for seed in range(args.seeds):
            tuned, tried = study.best_of_grid(1000 + seed)
            plain, whole = study.point(), study.point(intrinsic=True)
            points = {"fixed": plain, f"fixed, best of {tried}": tuned}
            lines = {
                "learnt numbers": (plain, None),
                "learnt numbers and reward": (whole, None),
                f"the same, last {args.last} updates": (whole, args.last),
            }
            for line, (x, last) in lines.items():
                points[line], path = study.learnt(x, seed, args.outer, args.rate, last)
                paths.setdefault(line, []).append(path)
            for line, x in points.items():
                curves = [study.after(x, 100 * (seed + 1) + k) for k in range(2)]  # draws that nothing was learnt with
                rows.setdefault(line, []).append(np.mean(curves, 0))
                learnt[line] = x
        print(f"{name}: return after {args.steps} updates of {args.episodes} episodes, {args.seeds} seeds")
        for line, curves in rows.items():
            ends = np.array(curves)[:, -1]
            print(f"  {line:28s} {ends.mean():.3f} ({ends.min():.3f} to {ends.max():.3f})   {described(learnt[line])}")
        found[name] = {line: np.array(curves) for line, curves in rows.items()}, paths, learnt
        tuned, best = (found[name][0][line][:, -1] for line in (f"fixed, best of {tried}", "learnt numbers and reward"))
        order = "above" if best.min() > tuned.max() else "below" if best.max() < tuned.min() else "within the spread of"
        print(f"  trainings with learnt numbers and reward end {order} those with the best fixed numbers")
    draw(args.out, found, args.steps)
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all")
    return found


def draw(path, found, steps):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6 * len(found)), layout="constrained")
    for axes, name in zip(figure.subplots(len(found), 3, squeeze=False), found, strict=True):
        rows, paths, learnt = found[name]
        updates = steps // 10 * np.arange(1, 11)
        for k, (line, curves) in enumerate(rows.items()):
            axes[0].plot(updates, curves.mean(0), color=f"C{k}", label=line)
            axes[0].fill_between(updates, curves.min(0), curves.max(0), color=f"C{k}", alpha=0.15, lw=0)
            if line in paths:
                axes[1].plot(np.mean(paths[line], 0), color=f"C{k}", label=line)
        axes[0].set(title=f"{name}: trainings with fresh draws", xlabel="updates", ylabel="return")
        axes[0].legend(fontsize=7)
        axes[1].set(title="the return that is climbed", xlabel="outer steps", ylabel="return after a training")
        reward = np.asarray(learnt["learnt numbers and reward"]["intrinsic"])
        if name == "grid":
            side = int(len(reward) ** 0.5)
            image = axes[2].imshow(reward.max(1).reshape(side, side), cmap="coolwarm")
            figure.colorbar(image, ax=axes[2])
            arrows = np.array([[1, 0], [-1, 0], [0, -1], [0, 1]])[reward.argmax(1)]
            rows_, columns = np.divmod(np.arange(side * side), side)
            axes[2].quiver(columns, rows_, *arrows.T, pivot="middle")
            axes[2].set(title="learnt reward: its best action and size", xticks=[], yticks=[])
        else:
            names = ["place", "speed", "angle", "turn"]
            axes[2].barh([f"{n}²" for n in names] + [f"{n}, with the push" for n in names], reward)
            axes[2].set(title="learnt reward: its weights")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
