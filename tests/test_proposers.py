"""The closed grammar: hostile texts, mutations of them, finite values and gradients, and register programs."""

from __future__ import annotations

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.proposers import (
    Grammar,
    GrammarError,
    GrammarProposer,
    OptunaProposer,
    Parameter,
    Refused,
    ReplayProposer,
    Trial,
    assemble,
    execute,
)
from bilevel.proposers.expressions import Expression, depth, size, text, unscaled
from bilevel.proposers.trials import best_of

GRAMMAR = Grammar(("I1", "J"))
HOSTILE = [
    "__import__('os').system('touch /tmp/x')",
    "I1.__class__.__mro__",
    "(lambda: I1)()",
    "[I1 for I1 in (1,)]",
    "I1 if J else I1",
    "I1 := 1",
    "f'{J}'",
    "exec('1')",
    "eval(I1)",
    "open(J)",
    "I1[0]",
    "I1; J",
    "I1 == J",
    "I1 and J",
    "J ** J",
    "J ** 4",
    "J ** 2 ** 3",
    "1e7",
    "1e999",
    "nan",
    "inf",
    "log(J, I1)",
    "max(J)",
    "log(base=J)",
    "log(*J)",
    "((((" * 40 + "J",
    "-" * 300 + "J",
    "(" * 300,
    "J" * 401,
    "J + " * 60 + "J",
    "\u0399" + "1",
    "J\x00",
    "J # comment",
    "J \\\n + 1",
    "'J'",
    "0x10",
    "1_000",
    "1j",
    "...",
    "@J",
    "",
    "   ",
    "await J",
    "J = 1",
    "<script>alert(1)</script>",
    "$(reboot)",
    "{{7*7}}",
    None,
    3,
    b"J",
    ["J"],
]


WATCHED = ("exec", "compile", "import", "open", "os.", "subprocess.", "socket.", "ctypes.", "pickle.")
watching, seen = False, []


def hook(event, arguments):
    if watching and event.startswith(WATCHED):
        seen.append((event, arguments))


sys.addaudithook(hook)  # the interpreter's own: nothing is compiled, run, imported or opened without it


def parsed(source):
    """What the grammar reads in a text; nothing has run meanwhile."""
    global watching
    watching = True
    try:
        return GRAMMAR.parse(source)
    finally:
        watching = False
        assert not seen, seen


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_are_refused_in_a_bounded_sentence(source):
    try:
        parsed(source)
    except GrammarError as error:
        refused = str(error)
    else:
        refused = ""
    assert refused
    assert len(refused) < 160
    assert refused.isascii() or "character" in refused


def test_the_watch_would_see_code_that_runs():
    global watching
    watching = True
    eval("1 + 1")
    watching = False
    assert {event for event, _ in seen} >= {"compile", "exec"}
    seen.clear()


def test_twelve_thousand_mutations_are_refused_or_within_the_limits():
    rng = np.random.default_rng(0)
    seeds = [s for s in HOSTILE if isinstance(s, str)] + ["I1 - 2*log(J)", "sq(J - 1)/max(I1, 2)", "-J**2 + exp(-I1)"]
    pieces = [
        "(",
        ")",
        "__",
        ".",
        "import os",
        "lambda",
        "**",
        "1e9",
        "log(",
        "J",
        "I1",
        ",",
        "'",
        "\n",
        "\0",
        "{",
        "=",
        "9" * 50,
    ]
    accepted = 0
    for _ in range(12_000):
        source = seeds[rng.integers(len(seeds))]
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(source) + 1))
            move = rng.integers(3)
            if move == 0:
                source = source[:at] + pieces[rng.integers(len(pieces))] + source[at:]
            elif move == 1:
                source = source[:at] + source[at + int(rng.integers(1, 6)) :]
            else:
                source = source[:at] + chr(int(rng.integers(1, 300))) + source[at + 1 :]
        try:
            node = parsed(source)
        except GrammarError as error:
            assert len(str(error)) < 160
        else:
            accepted += 1
            assert size(node) <= 48
            assert depth(node) <= 12
            assert GRAMMAR.parse(text(node)) == node
    assert 200 < accepted < 6000


def random_laws(count, seed=0):
    return GrammarProposer(GRAMMAR, terms=1, term_depth=5).ask([], count, jax.random.key(seed))


def test_programs_equal_the_walk_bit_for_bit_and_one_compile_serves_all():
    i1, j = jnp.linspace(0.5, 4, 9), jnp.linspace(-0.5, 2, 9)
    run, compiled = jax.jit(execute), 0
    for law in random_laws(12):
        program = assemble(law.terms[0], GRAMMAR.variables, 40)
        walked = jax.jit(lambda a, b, law=law: law.evaluate({"I1": a, "J": b}, [1.0]))(i1, j)
        np.testing.assert_array_equal(run(program, (i1, j)), walked)
    compiled = run._cache_size()
    assert compiled == 1


def test_values_and_derivatives_stay_finite_where_operations_are_not():
    points = np.float32([0.0, -1.0, 1e-30, 1e6, -1e6, 1.0])
    nested = "1000000*(" * 8 + "J" + ")" * 8
    for source in (
        "log(J)",
        "1/J",
        "sqrt(J)",
        "exp(J)",
        "exp(exp(J))",
        "log(log(J))",
        "J/(J - J)",
        nested,
        "sq(sq(sq(sq(sq(J)))))",
    ):
        law = Grammar(("J",)).expression(source)
        value = lambda x, law=law: law.evaluate({"J": x})
        derivatives = value, jax.grad(value), jax.jacfwd(jax.grad(value))
        found = jax.jit(jax.vmap(lambda x, all=derivatives: [f(x) for f in all]))(points)
        assert np.isfinite(found).all(), source


def test_laws_are_printed_as_mathematics():
    law = GRAMMAR.additive(["I1", "log(J)", "sq(J - 1)/I1"])
    assert law.text([2.0, -3.0, 0.5]) == "2*I1 - 3*log(J) + 0.5*(sq(J - 1)/I1)"
    assert law.latex([2.0, -3.0, 0.5]).startswith(r"2 \, I_{1} - 3 \, \log\left(J\right)")
    assert r"\frac{\left(J - 1\right)^{2}}{I_{1}}" in law.latex()


def test_answers_are_data():
    good = '{"terms": ["a*I1", "log(J)"], "params": [{"name": "a", "init": 2, "lower": 0, "upper": null}]}'
    law = ReplayProposer(("Sure! Here is my law: " + good + " Best wishes.",), GRAMMAR).ask([], 4, jax.random.key(0))[0]
    assert law.text() == "a*I1 + log(J)"
    assert law.parameters == (Parameter("a", 2.0, 0.0, math.inf),)
    for bad, reason in (
        ("no law", "no JSON object"),
        ('{"terms": "J"}', "has to be a list"),
        ('{"terms": ["J"], "params": [{"name": "log"}]}', "may not be that of"),
        ('{"terms": ["J*a"], "params": [{"name": "a", "init": 1e400}]}', "no JSON|number"),
        ('{"terms": ["__import__"]}', "not allowed|not in the grammar"),
        ("{" * 5000, "no JSON object"),
    ):
        refused = ReplayProposer((bad,), GRAMMAR).ask([], 1, jax.random.key(0))[0]
        assert isinstance(refused, Refused)
        assert any(part in refused.reason for part in reason.split("|")), refused


def test_evolution_follows_from_history_and_key_and_never_repeats():
    proposer, key = GrammarProposer(GRAMMAR, parents=3), jax.random.key(1)
    first = proposer.ask([], 40, key)
    assert len({str(law) for law in first}) == 40
    trials = [Trial(i, 0, law, float(i + 1), np.ones(3)) for i, law in enumerate(first)]
    again = proposer.ask(trials, 40, key)
    assert again == proposer.ask(trials, 40, key)
    assert not {map(str, again)} & {map(str, first)}
    assert all(law.complexity for law in again)


def test_terms_that_say_the_same_are_one_term_and_sums_are_terms_of_their_own():
    grammar = Grammar(("I1", "J"), positive=("I1", "J"))
    one = lambda source: text(unscaled(grammar.parse(source), grammar.positive))
    for source, wanted in (
        ("-3*abs(I1)", "I1"),
        ("sq(log(sqrt(J)))", "sq(log(J))"),
        ("log(J*J)", "log(J)"),
        ("sqrt(sq(J))", "J"),
        ("0.5/sqrt(J)", "1/sqrt(J)"),
        ("J + J", "J"),
        ("abs(J - I1)", "abs(J - I1)"),
    ):
        assert one(source) == wanted
    proposer = GrammarProposer(grammar, exclude=("log(J)",))
    law = lambda *terms: proposer._law([grammar.parse(t) for t in terms])
    assert str(law("3*I1", "abs(I1) + sq(log(J))")) == str(law("I1", "sq(log(J))"))
    assert str(law("I1", "J - 2*log(J)")) == str(law("I1", "J"))
    narrow = dataclasses.replace(proposer, terms=2)
    assert str(narrow._law([grammar.parse("I1"), grammar.parse("J - 2*log(J)")])) == "p0*I1"
    with pytest.raises(ValueError, match=r"positive=.*'K'.* is none of I1, J"):
        Grammar(("I1", "J"), positive=("K",))


def test_laws_are_differentiable_within_a_scan_of_many(x64):
    # A derivative that does not depend on a field (of log(b) by a) has to have its batch axis all the same.
    law = Grammar(("a", "b")).additive(["a", "log(b)"])
    x = jnp.linspace(1.0, 2.0, 12).reshape(3, 4)

    def path(c):
        slope = lambda x: jax.jvp(lambda a: law.evaluate({"a": a, "b": x**2}, c), (x,), (jnp.ones_like(x),))[1]
        return jax.vmap(lambda x: jax.lax.scan(lambda x, _: (x + slope(x), None), x, length=2)[0])(x)

    found = jax.jit(jax.jacfwd(path))(jnp.array([0.5, 0.1]))
    np.testing.assert_allclose(found[..., 0], 2.0)
    np.testing.assert_allclose(found[..., 1], 0.0)


def test_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"is none of log, exp"):
        Grammar(("J",), functions=("sin",))
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        GrammarProposer(GRAMMAR, exploit=2.0)
    with pytest.raises(ValueError, match=r"a pair .low, high. or a list"):
        OptunaProposer({"depth": 3})


def test_optuna_proposes_from_history_and_key():
    pytest.importorskip("optuna")
    proposer = OptunaProposer({"depth": (1, 4), "rate": (1e-4, 1e-1), "kind": ["a", "b"]}, log=("rate",))
    key = jax.random.key(0)
    first = proposer.ask([], 3, key)
    assert all(1 <= p["depth"] <= 4 and 1e-4 <= p["rate"] <= 1e-1 and p["kind"] in "ab" for p in first)
    trials = [Trial(i, 0, p, float(p["depth"])) for i, p in enumerate(first)]
    assert proposer.ask(trials, 2, key) == proposer.ask(trials, 2, key)


def test_values_are_shown_by_their_names():
    law = Expression((Grammar(("J",)).parse("J"),), (Parameter("b"), Parameter("a")))
    assert law.text({"a": 1.0, "b": 2.0}) == "J  [b = 2, a = 1]"


def test_a_transcript_that_was_cut_is_read_to_its_cut(tmp_path):
    file = tmp_path / "talk.jsonl"
    file.write_text('{"answer": "one"}\n{"answer": "two"}\n{"answer": "th')
    assert ReplayProposer.from_transcript(file, Grammar(("J",))).answers == ("one", "two")
    file.write_text('{"answer": "on\n{"answer": "two"}\n')
    with pytest.raises(ValueError, match=r"talk\.jsonl:1 is no line of a transcript"):
        ReplayProposer.from_transcript(file, Grammar(("J",)))


@pytest.mark.parametrize("count", [0, -1, True, 1.5])
def test_the_best_of_none_are_not_all(count):
    with pytest.raises(ValueError, match=r"best_of\(history, .*\): a positive integer"):
        best_of([], count)


def test_optunas_samplers_that_remember_are_refused():
    optuna = pytest.importorskip("optuna")
    proposer = OptunaProposer({"a": [1, 2, 3]}, sampler=lambda seed: optuna.samplers.GridSampler({"a": [1, 2, 3]}))
    with pytest.raises(ValueError, match="GridSampler remembers more than the trials"):
        proposer.ask([], 1, jax.random.key(0))


def test_a_logarithmic_scale_is_of_positive_pairs():
    for space in ({"a": [1, 2]}, {"a": (-1.0, 1.0)}):
        with pytest.raises(ValueError, match="a logarithmic scale is for a pair of positive numbers"):
            OptunaProposer(space, log=("a",))
