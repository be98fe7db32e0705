"""A training step of concept erasure against the same in PyTorch, with diffusers' `FluxTransformer2DModel`.

    python benchmarks/erasure.py [--rounds 9] [--steps 20] [--batch 16]

First our network and theirs are compared on other configurations than the fixtures': velocities, attention maps and
gradients. Then both sides descend the plain sum of the two levels on the shipped digits, with AdamW on the adapter,
from one start and on the same batches, and their adapters are compared after five steps. Both run on one core of one
process, and rounds of `--steps` steps alternate; our side draws its batches within the step, theirs are drawn before.
The reference is written to be quick: one pass for both losses of a level, attention maps kept in one block alone,
frozen weights without gradients, adapters as low-rank branches. Memory is the peak resident size of a process of its
own for each side, less what it held before the first step: ours compiles within it, and what the compiled programme
itself needs is printed beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import _harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from bilevel import run, solvers
from bilevel.applications.erasure import Flux, digits, erasure
from bilevel.data import as_step_key

RATE, DECAY = 2e-3, 1e-5
CONFIGURATIONS = {
    "deep, guidance": dict(num_layers=3, num_single_layers=4, attention_head_dim=12, num_attention_heads=3,
                           axes_dims_rope=(2, 4, 6), guidance_embeds=True),
    "single blocks alone": dict(num_layers=0, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
                                axes_dims_rope=(0, 4, 4), out_channels=5),
    "dual blocks alone": dict(num_layers=2, num_single_layers=0, attention_head_dim=16, num_attention_heads=1,
                              axes_dims_rope=(4, 4, 8)),
}  # fmt: skip


class Mapped:
    """Attention as diffusers', with the probabilities kept in `maps`."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_
    ):
        split = lambda a: a.unflatten(-1, (attn.heads, -1))
        q, k = attn.norm_q(split(attn.to_q(hidden_states))), attn.norm_k(split(attn.to_k(hidden_states)))
        v, words = split(attn.to_v(hidden_states)), 0
        if encoder_hidden_states is not None:
            words = encoder_hidden_states.shape[1]
            q = torch.cat([attn.norm_added_q(split(attn.add_q_proj(encoder_hidden_states))), q], 1)
            k = torch.cat([attn.norm_added_k(split(attn.add_k_proj(encoder_hidden_states))), k], 1)
            v = torch.cat([split(attn.add_v_proj(encoder_hidden_states)), v], 1)
        q, k = (self.turned(a, *image_rotary_emb) for a in (q, k))
        self.maps = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, -1)
        out = torch.einsum("bhqk,bkhd->bqhd", self.maps, v).flatten(2)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, words:]), attn.to_add_out(out[:, :words])

    @staticmethod
    def turned(x, cosine, sine):
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        turn = torch.stack([-imaginary, real], -1).flatten(-2)
        return x * cosine[:, None] + turn * sine[:, None]


class LowRank(nn.Module):
    """A frozen linear layer with the branch B A, which `on` switches off."""

    on = True

    def __init__(self, base, a, b):
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a), nn.Parameter(b)

    def forward(self, x):
        y = self.base(x)
        return y + (x @ self.a.T) @ self.b.T if LowRank.on else y


class Level(nn.Module):
    """The noise level's embedding without a pooled prompt, which diffusers' class always has."""

    def __init__(self, embed):
        super().__init__()
        self.proj, self.mlp = embed.time_proj, embed.timestep_embedder

    def forward(self, timestep, pooled):
        return self.mlp(self.proj(timestep).to(pooled.dtype))


def theirs(config, params):
    """diffusers' class with our parameters."""
    config = {"in_channels": 12, "joint_attention_dim": 10, "pooled_projection_dim": 7, **config}
    pooled = config["pooled_projection_dim"]
    net = FluxTransformer2DModel(**{**config, "pooled_projection_dim": pooled or 1})
    if not pooled:
        embed = net.time_text_embed
        net.time_text_embed = Level(embed)
        params = {n.replace("time_text_embed.timestep_embedder", "time_text_embed.mlp"): a for n, a in params.items()}
    net.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in params.items()})
    return net.requires_grad_(False)


def parity():
    """Relative to the largest number of an array, the largest difference of any."""
    for name, config in CONFIGURATIONS.items():
        flux = Flux(in_channels=12, joint_attention_dim=10, pooled_projection_dim=7, **config)
        rng = np.random.default_rng(0)
        draw = lambda *shape, rng=rng: rng.normal(size=shape).astype(np.float32)
        params = {
            n: draw(*s) * 0.4 / np.sqrt(s[-1]) + (n.endswith(("_q.weight", "_k.weight")) and "norm" in n)
            for n, s in flux.shapes().items()
        }
        x, c, pooled, t = draw(2, 6, 12), draw(2, 3, 10), draw(2, 7), np.array([0.2, 0.9], np.float32)
        img, txt = rng.integers(0, 5, (6, 3)).astype(np.float32), np.zeros((3, 3), np.float32)
        guidance = np.array([3.5, 1.0], np.float32) if flux.guidance_embeds else None
        weight = draw(2, 6, flux.in_channels if flux.out_channels is None else flux.out_channels)
        blocks = range(flux.num_layers + flux.num_single_layers)

        def ours(params, x, flux=flux, c=c, t=t, img=img, txt=txt, pooled=pooled, guidance=guidance, blocks=blocks):
            given = {"img_ids": img, "txt_ids": txt, "pooled_projections": pooled, "guidance": guidance}
            return flux(params, x, c, t, attention=tuple(blocks), **given)

        def loss(params, x, ours=ours, weight=weight):
            found = ours(params, x)
            return (found.velocity * weight).sum(), found

        gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (_, found), (of_params, of_x) = gradient(params, jnp.asarray(x))
        net = theirs(config, flux.unstack(params)).requires_grad_(True)
        modules = [*net.transformer_blocks, *net.single_transformer_blocks]
        for block in modules:
            block.attn.set_processor(Mapped())
        tensor = lambda a: None if a is None else torch.from_numpy(a)
        x_t = torch.from_numpy(x).requires_grad_(True)
        out = net(
            x_t, tensor(c), tensor(pooled), tensor(t), tensor(img), tensor(txt), tensor(guidance), return_dict=False
        )[0]
        (out * tensor(weight)).sum().backward()
        gap = lambda a, b: float(np.abs(np.asarray(a) - b.detach().numpy()).max() / b.detach().abs().max())
        mine = flux.unstack(of_params)
        gradients = [gap(mine[n], p.grad) for n, p in net.named_parameters() if p.grad is not None]
        maps = [gap(found.attention[k], block.attn.processor.maps) for k, block in enumerate(modules)]
        # The same with diffusers' own attention, so that the reference's is seen to be it.
        for block in modules:
            block.attn.set_processor(type(block.attn)._default_processor_cls())
        own = net(
            x_t, tensor(c), tensor(pooled), tensor(t), tensor(img), tensor(txt), tensor(guidance), return_dict=False
        )[0]
        print(
            f"{name}: velocity {gap(found.velocity, own):.1e}, attention {max(maps):.1e}, gradients "
            f"{max(*gradients, gap(of_x, x_t.grad)):.1e}",
            flush=True,
        )


def problem(batch):
    """The example's, with the base's own images of the erased word."""
    base = digits.base()
    (ink, labels), _ = digits.real()
    kept, wanted = labels != 3, [3] * 48
    colours = np.arange(kept.sum()) % 3
    images, shades = jax.jit(lambda key: digits.draw(base, base.params, wanted, False, key))(jax.random.key(99))
    app = erasure(
        base.model, base.params, base.words, word="three", synonym="3", irrelevant=("seven", "zero", "five"),
        prompts=digits.prompts_for(wanted, shades, [False] * 48, 0), images=images,
        kept_prompts=digits.prompts_for(labels[kept], colours, [False] * int(kept.sum()), 0),
        kept_images=digits.to_tokens(digits.coloured(ink[kept], colours)), batch=batch,
    )  # fmt: skip
    return base, app


class Ours:
    def __init__(self, app, steps):
        self.app, self.solver = app, solvers.WeightedSum(optax.adamw(RATE, weight_decay=DECAY))
        move = lambda problem, y, key: run(problem, self.solver, None, y, steps=steps, key=key)[0].y
        self.problem, self.key = jax.tree.map(jnp.asarray, app.problem), jax.random.key(0)
        self.program, self.compiling = _harness.compiled(jax.jit(move), self.problem, app.y0, self.key)

    def __call__(self):
        return jax.block_until_ready(self.program(self.problem, self.app.y0, self.key))


class Theirs:
    """Plain PyTorch."""

    def __init__(self, base, app, steps):
        config = {"in_channels": 12, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16}
        config |= {"num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 0}
        flux = digits.NETWORK
        self.net = theirs({**config, "axes_dims_rope": flux.axes_dims_rope}, flux.unstack(base.params))
        self.start = {n: torch.from_numpy(np.array(a)) for n, a in flux.unstack(app.y0).items()}
        self.adapters = {}
        for name in {n.rpartition(".lora_")[0] for n in self.start}:
            parent, _, last = name.rpartition(".")
            owner = self.net.get_submodule(parent)
            layer = LowRank(getattr(owner, last), *(self.start[f"{name}.lora_{k}.weight"].clone() for k in "AB"))
            setattr(owner, last, layer)
            self.adapters |= {f"{name}.lora_A.weight": layer.a, f"{name}.lora_B.weight": layer.b}
        self.watched = self.net.transformer_blocks[-1].attn
        self.watched.set_processor(Mapped())
        row, column = np.divmod(np.arange(16, dtype=np.float32), 4)
        self.img = torch.from_numpy(np.stack([0 * row, row, column], 1).astype(np.float32))
        self.txt, self.null = torch.zeros(4, 3), torch.from_numpy(np.array(base.words([""])))
        levels = [app.problem.levels(as_step_key(jax.random.key(0), k)) for k in range(steps)]
        self.batches = [
            jax.tree.map(lambda a: torch.from_numpy(np.array(a)), (level.lower.batch, level.upper.batch))
            for level in levels
        ]

    def flow(self, x, prompt, t):
        pooled = torch.zeros(len(x), 1)
        return self.net(x, prompt, pooled, t, self.img, self.txt, return_dict=False)[0]

    def attend(self, x, prompt, t):
        velocity = self.flow(x, prompt, t)
        return velocity, self.watched.processor.maps[:, :, 4:, :4]

    def loss(self, batch):
        on_path = lambda image, noise, t: (1 - t)[:, None, None] * image + t[:, None, None] * noise
        onto = lambda maps, column: torch.einsum("bhqw,bw->bhq", maps, column)
        (((image, prompt, column), noise, t), (kept, anchored)) = batch
        x_t, n = on_path(image, noise, t), len(t)
        (of_kept, kept_prompt), kept_noise, kept_t = kept
        (word, word_prompt, word_column, others, marks), word_noise, word_t = anchored
        x_word, k = on_path(word, word_noise, word_t), marks.shape[1]
        with torch.no_grad():
            LowRank.on = False
            null = self.null.expand(n, -1, -1)
            given, empty = self.flow(torch.cat([x_t, x_t]), torch.cat([prompt, null]), torch.cat([t, t])).chunk(2)
            target = empty - (given - empty)
            maps = self.attend(x_word.repeat_interleave(k, 0), others.flatten(0, 1), word_t.repeat_interleave(k, 0))[1]
            maps = onto(maps, marks.flatten(0, 1)).unflatten(0, (-1, k)).movedim(1, 0)
            LowRank.on = True
        velocity, attention = self.attend(x_t, prompt, t)
        f = (velocity - target).square().mean() + 0.1 * onto(attention, column).mean()
        x = torch.cat([on_path(of_kept, kept_noise, kept_t), x_word])
        velocity, attention = self.attend(x, torch.cat([kept_prompt, word_prompt]), torch.cat([kept_t, word_t]))
        m = len(kept_t)
        keep = (velocity[:m] - (kept_noise - of_kept)).square().mean()
        unit = lambda a: a * torch.rsqrt(a.square().sum(-1, keepdim=True) + 1e-12)
        anchor = unit(onto(attention[m:], word_column).flatten(1))
        similar = torch.einsum("bd,kbd->kb", anchor, unit(maps.flatten(2))) / 0.07
        return f + keep + 0.02 * (similar[0] - torch.logsumexp(similar, 0)).mean()

    def __call__(self):
        """All batches in turn, from the start."""
        with torch.no_grad():
            for name, value in self.adapters.items():
                value.copy_(self.start[name])
        rule = torch.optim.AdamW(self.adapters.values(), RATE, weight_decay=DECAY, foreach=True)
        for batch in self.batches:
            rule.zero_grad()
            self.loss(batch).backward()
            rule.step()
        return {name: value.detach().numpy() for name, value in self.adapters.items()}


def peak(name):
    """Of this process in MiB; not `getrusage`, which starts at the parent's."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024


def side(options, base, app):
    before = peak("VmRSS")
    (Ours(app, options.steps) if options.side == "ours" else Theirs(base, app, options.steps))()
    print(peak("VmHWM") - before)


def main():
    parser = _harness.arguments(__doc__, rounds=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", choices=("torch", "ours"), help=argparse.SUPPRESS)
    options = _harness.start(parser, "torch", "diffusers", steps=5, batch=4)
    torch.set_num_threads(1)
    base, app = problem(options.batch)
    if options.side:
        return side(options, base, app)
    parity()
    mine, reference = Ours(app, 5)(), Theirs(base, app, 5)()
    mine = digits.NETWORK.unstack(mine)
    moved = _harness.difference(*(np.concatenate([np.ravel(s[n]) for n in reference]) for s in (mine, reference)))
    still = {n: np.array(a) for n, a in digits.NETWORK.unstack(app.y0).items()}
    path = np.sqrt(sum(np.sum((reference[n] - still[n]) ** 2) for n in reference))
    off = np.sqrt(sum(np.sum((reference[n] - np.asarray(mine[n])) ** 2) for n in reference))
    print(
        f"after 5 steps the adapters differ by {moved:.1e} of their norm and {off / path:.1e} of the way that they went"
    )
    ours, torchs = Ours(app, options.steps), Theirs(base, app, options.steps)
    temporary = ours.program.memory_analysis().temp_size_in_bytes / 2**20
    print(f"compiled in {ours.compiling.median():.1f} s CPU; its temporaries are {temporary:.0f} MiB")
    times = _harness.interleaved({"torch": torchs, "ours": ours}, options.rounds)
    each = ", ".join(f"{name} {taken.median(unit=1e3 / options.steps):.2f}" for name, taken in times.items())
    print(f"CPU ms per step: {each}; ratio {_harness.ratio(times['ours'], times['torch'])}", flush=True)
    command = [sys.executable, __file__, "--steps", str(options.steps), "--batch", str(options.batch)]
    for name in ("torch", "ours"):
        output = subprocess.run([*command, "--side", name], capture_output=True, check=True, text=True).stdout
        print(f"peak memory above the start, {name}: {float(output.splitlines()[-1]):.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
