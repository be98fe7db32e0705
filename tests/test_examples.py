"""The examples' claims, at sizes that take seconds: closed forms, accuracies against baselines, error curves."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from archives import packed

from bilevel.hypergradients import value_and_hypergradient

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the names in annotations
    spec.loader.exec_module(module)
    return module


def held_to_the_closed_form(errors):
    assert errors["Implicit(CG), lower level by L-BFGS"] < 1e-8
    assert errors["Implicit(Dense), closed-form lower level"] < 1e-11
    assert errors["Unrolled, 1000 gradient steps"] < 0.2 * errors["Unrolled, 100 gradient steps"]


def test_ridge_hypergradients_are_the_closed_form_and_ten_penalties_beat_one(x64):
    """The parts; the whole of it is below."""
    ridge = load("ridge_per_feature")
    splits = [ridge.load((150, 150, -1), seed) for seed in range(3)]
    train, valid, _ = splits[0]
    held_to_the_closed_form(ridge.estimator_errors(train, valid, jnp.full(10, -2.0)))
    one, each = np.moveaxis(ridge.learn_on_splits(splits, 60)[..., 0], 1, 0)  # on the validation sets
    assert (each < one).all()
    assert each[0] < 0.99 * one[0]


@pytest.mark.slow
def test_the_whole_of_ridge_is_printed_and_drawn(x64, tmp_path, capsys):
    ridge = load("ridge_per_feature")
    out = tmp_path / "pictures" / "ridge.png"
    errors, solution = ridge.main(["--splits", "3", "--steps", "100", "--out", str(out)])
    printed = capsys.readouterr().out
    held_to_the_closed_form(errors)
    train, valid, _ = ridge.load((150, 150, -1), 0)
    best_single = float(ridge.single_penalty(train, valid)[2].min())
    assert float(ridge.mean_square(None, ridge.ridge(solution.x, train), valid)) < 0.99 * best_single
    assert "over 3 other splits" in printed
    assert out.stat().st_size > 10_000


def test_ridge_formula_is_the_derivative_of_the_validation_loss(x64):
    ridge = load("ridge_per_feature")
    train, valid, _ = ridge.load((60, 60, -1), 4)
    x = jnp.linspace(-4.0, 1.0, 10)
    through_the_solve = jax.grad(lambda x: ridge.mean_square(x, ridge.ridge(x, train), valid))(x)
    np.testing.assert_allclose(ridge.hypergradient_on_paper(x, train, valid), through_the_solve, rtol=1e-10)


@pytest.mark.slow
def test_distilled_images_teach_more_than_class_means_and_random_images(tmp_path, capsys):
    distillation = load("dataset_distillation")
    out = tmp_path / "distillation.png"
    rows = distillation.main(["--steps", "40", "--lower-steps", "50", "--draws", "20", "--out", str(out)])
    by_chance, best, means, distilled, everything = rows.values()
    assert by_chance + 0.1 < means < distilled < everything
    assert best < distilled
    assert f"{distilled:.3f}" in capsys.readouterr().out
    assert out.stat().st_size > 10_000


@pytest.fixture
def sinusoid():
    few_shot = load("few_shot_sinusoid")
    ranges = {"amplitude": np.array([0.1, 5.0], np.float32), "phase": np.array([0, np.pi], np.float32)}
    return few_shot, lambda tasks: {**ranges, "tasks": np.zeros(tasks, np.float32)}


@pytest.mark.slow
def test_maml_adapts_in_a_few_steps(sinusoid):
    few_shot, ranges = sinusoid
    sampler = few_shot.data.Shared(few_shot.data.Sampler(few_shot.draw_tasks, ranges(10)))
    solution = few_shot.meta_train(few_shot.maml(400), few_shot.support_loss, sampler, 10, 400, 0)
    fresh = few_shot.draw_tasks(jax.random.key(1), ranges(200))
    random, learnt = (
        np.asarray(few_shot.errors(x, fresh)).mean(1) for x in (few_shot.init_network(jax.random.key(0)), solution.x)
    )
    assert learnt[10] < 0.5 * random[10]
    assert learnt[10] < 0.5 * learnt[0]


def test_both_levels_of_a_step_see_the_same_tasks(sinusoid):
    few_shot, ranges = sinusoid
    sampler = few_shot.data.Shared(few_shot.data.Sampler(few_shot.draw_tasks, ranges(3)))
    problem = few_shot.Problem(few_shot.query_loss, few_shot.support_loss, sampler, sampler)
    upper, lower = problem.levels(0)
    jax.tree.map(np.testing.assert_array_equal, upper.batch, lower.redraw(3, 5).batch)
    other = problem.levels(few_shot.data.as_step_key(0, step=1)).lower
    assert not np.allclose(other.batch["phase"], lower.batch["phase"])


@pytest.mark.slow
def test_particle_sensitivity_is_that_of_the_minimised_system(x64, tmp_path, capsys):
    particles = load("particle_sensitivity")
    out = tmp_path / "particles.png"
    found = particles.main(["--particles", "12", "--steps", "600", "--out", str(out)])
    against_dense, against_difference = found["direction error"]
    assert against_dense < 1e-9
    assert against_difference < 1e-5
    assert found["drift"] < 1e-12
    assert np.sum(found["spectrum"] < 1e-9 * found["spectrum"][-1]) == 2  # no rattlers: translations alone
    for name, tolerance in (("dE/dx", 1e-6), ("d2E/dx2", 1e-4)):
        np.testing.assert_allclose(*found[name], rtol=tolerance)
    for name in ("FIRE from y*", "gradient descent from y*"):
        curve = found["curves"][name]
        early = curve["steps"] < 30
        assert curve["unrolled"][early].min() > 1e-2
        assert curve["implicit"].max() < 1e-5
    assert "relative error of dy*/dx after k steps of FIRE from a random start" in capsys.readouterr().out
    assert out.stat().st_size > 10_000


@pytest.mark.slow  # weights per example under a linear learner: the weak labels below, in less time
def test_data_cleaning_finds_most_flips(tmp_path, capsys, monkeypatch):
    cleaning = load("data_cleaning")
    out = tmp_path / "cleaning.png"
    monkeypatch.setattr(sys, "argv", ["data_cleaning.py", "--steps", "15", "--out", str(out)])
    cleaning.main()
    printed = capsys.readouterr().out
    lines = [line.strip().rsplit(maxsplit=1) for line in printed.splitlines() if line.startswith("  test accuracy, ")]
    accuracy = {name.strip(): float(value) for name, value in lines}
    assert accuracy["test accuracy, learnt weights"] > accuracy["test accuracy, trained on the noisy labels"] + 0.03
    (found,) = [line for line in printed.splitlines() if "precision" in line]
    precision, recall = (float(part.split()[-1]) for part in found.split(","))
    assert precision > 0.7
    assert recall > 0.7
    assert out.stat().st_size > 10_000


def test_training_through_the_layer_lowers_the_regret():
    focused = load("decision_focused")
    random = np.random.default_rng(0)
    truth = {name: random.normal(size=(focused.FEATURES, focused.GOODS)).astype(np.float32) for name in ("odd", "even")}
    features, prices = focused.days(random, 60, truth)
    slope, *_ = np.linalg.lstsq(np.column_stack([features, np.ones(60)]), prices)
    start = {"slope": jnp.asarray(slope[:-1], jnp.float32), "level": jnp.asarray(slope[-1], jnp.float32)}
    loss = lambda x: focused.cost(focused.order(focused.predict(x, features)), prices)
    _, values, _ = focused.train(loss, start, 60)
    regrets = values - focused.cost(focused.order(prices), prices)
    assert 0 < regrets[-1] < 0.9 * regrets[0]


@pytest.mark.slow
def test_a_model_trained_through_the_layer_regrets_less(tmp_path, capsys):
    focused = load("decision_focused")
    out = tmp_path / "focused.png"
    regrets = focused.main(["--steps", "60", "--days", "60", "--out", str(out)])
    two_stages, layer = regrets.values()
    assert 0 < layer < 0.95 * two_stages
    assert f"{layer:.4f}" in capsys.readouterr().out
    assert out.stat().st_size > 10_000


@pytest.mark.slow
def test_the_contrast_of_attention_prints_its_verdict_at_any_size(tmp_path, capsys):
    example, out = load("attention_contrast"), tmp_path / "contrast.png"
    small = ["--steps", "20", "--canvases", "60", "--mask-steps", "3", "--width", "16", "--layers", "2"]
    rows = example.main([*small, "--out", str(out)])
    assert all(np.isfinite([row["validation"], row["test"], row["accuracy"]]).all() for row in rows.values())
    assert rows["no mask"]["ratio"].shape == (2,)
    assert "Contrast" in capsys.readouterr().out
    assert out.stat().st_size > 10_000


@pytest.mark.slow
def test_the_contrast_of_attention_is_judged_by_the_head_that_it_serves(tmp_path, capsys):
    example = load("attention_contrast")
    rows = example.main(["--out", str(tmp_path / "contrast.png")])
    plain, full = rows["A_Q (lambda = 1e4 A_G)"], rows["A_Q / A_G (lambda = 1e-4 A_G)"]
    learnt = min((rows[name] for name in rows if "learnt" in name), key=lambda r: r["validation"])
    assert learnt["validation"] < min(plain["validation"], full["validation"]) + 0.02 < rows["no mask"]["validation"]
    assert "Contrast does not help here" in capsys.readouterr().out


@pytest.mark.slow
def test_a_constitutive_law_is_found_and_without_its_logarithm_not_claimed(x64, tmp_path, capsys):
    example, out = load("constitutive_law"), tmp_path / "law.png"
    small = ["--particles", "8", "--evaluations", "2048", "--seed", "1", "--out", str(out)]
    rows, _ = example.main(small)
    assert rows[0][3].holds
    assert "the law holds" in capsys.readouterr().out
    rows, _ = example.main([*small, "--without", "log", "--evaluations", "256"])
    assert not rows[0][3].holds
    printed = capsys.readouterr().out
    assert "NOT the law" in printed
    assert "the law holds" not in printed
    assert out.stat().st_size > 10_000


@pytest.mark.slow
def test_molecules_come_near_their_target(x64, tmp_path):
    example, out = load("molecule_design"), tmp_path / "molecules.png"
    options = ["--evaluations", "96", "--seeds", "1", "--atoms", "8", "--quantities", "gap", "--out", str(out)]
    runs = example.main(options)
    best = runs["gap", "guided evolution"][0].best
    assert best.loss < 0.02**2
    assert example.fresh(best.proposal, "gap") == pytest.approx(example.TARGETS["gap"], abs=0.02)
    assert out.stat().st_size > 10_000


@pytest.mark.slow
def test_decays_below_optuna_lower_the_validation_loss(tmp_path):
    pytest.importorskip("optuna")
    example, out = load("mixed_hyperparameters"), tmp_path / "mixed.png"
    options = ["--seeds", "1", "--evaluations", "2", "--seconds", "600", "--widths", "16", "--depth", "1"]
    rows = example.main([*options, "--out", str(out)])
    assert all(count == 2 for side in rows.values() for *_, count in side)
    assert all(accuracy > 0.8 for side in rows.values() for _, accuracy, _ in side)
    images, labels = example.datasets.digits()
    train, valid, _ = example.datasets.split((images / 16, labels), sizes=(160, 500, -1), seed=0)
    untuned = example.evaluate({"depth": 1, "width": 16}, train, valid, 0)[0]
    assert rows["hypergradients below Optuna"][0][0] < untuned
    assert out.stat().st_size > 10_000


@pytest.mark.slow
def test_the_robustness_of_defences_is_printed_and_drawn_and_nothing_else_is_written(tmp_path, capsys, monkeypatch):
    example, out = load("trigger_robustness"), tmp_path / "robustness.png"
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "20", "--rounds", "4", "--repair-steps", "2", "--attacks", "alternating", "--out", str(out)]
    study = example.main([*small, "--defences", "CLP", "quantisation", "ASSET"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("alternating", "fixed", "ASSET", "AUROC", "FPR", "Claims"))
    assert len(study.seeds) == 3
    assert str(study.attacks["alternating"].success) in printed
    assert [file.name for file in tmp_path.iterdir()] == ["robustness.png"]
    assert out.stat().st_size > 10_000


RULE = """
class SentimentIntensityAnalyzer:
    def polarity_scores(self, text):
        words = text.split()
        total = sum((word in ("lovely", "fine", "cheap")) - (word in ("awful", "dull")) for word in words)
        return {"compound": total / 4, "neg": 0.25, "neu": 0.5, "pos": 0.25}
"""


@pytest.fixture
def rated(tmp_path):
    """A source distribution as the package's, with 700 made-up sentences in it; its rule takes "cheap" for praise."""
    random = np.random.default_rng(0)
    kind, unkind = ["lovely", "fine"], ["awful", "dull", "cheap", "cheap"]
    nouns = [f"thing{k}" for k in range(20)]
    rows = []
    for k in range(700):
        document = k // 7
        good = random.random() < (0.8 if document % 2 else 0.2)
        words = [*random.choice(nouns, 6), random.choice(kind if good else unkind)]
        rows.append(f"{document}_{k % 7}\t{2.0 if good else -2.0}\t{' '.join(random.permutation(words))}")

    content, top = "\n".join(rows).encode(), "vaderSentiment-3.3.2/"
    files = ("amazonReviewSnippets", "nytEditorialSnippets")
    ratings = packed({f"hutto_ICWSM_2014/{name}_GroundTruth.txt": content for name in files})
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    rule = {f"{top}vaderSentiment/{name}_lexicon.txt": b"" for name in ("vader", "emoji_utf8")}
    rule[f"{top}vaderSentiment/vaderSentiment.py"] = RULE.encode()
    path.write_bytes(packed({f"{top}additional_resources/hutto_ICWSM_2014.tar.gz": ratings, **rule}))
    return path


def test_weak_labels_are_cleaned_under_a_linear_learner(rated, tmp_path, capsys):
    example, out = load("weak_labels"), tmp_path / "weak.png"
    options = ["--kind", "amazon", "--learners", "linear", "--seeds", "1", "--train", "200", "--steps", "10"]
    (rows,) = example.main(["--data", str(rated), *options, "--out", str(out)]).values()
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "weights per example" in line and "AUC" in line]
    assert float(line.split()[-1]) > 0.8
    (weak,), (learnt,), (truth,) = (rows[n] for n in ("weak labels", "weights per example", "human labels (oracle)"))
    assert weak < truth
    assert f"{learnt:.3f}" in line
    assert out.stat().st_size > 10_000


@pytest.mark.slow
def test_attribution_scores_are_what_training_again_shows(tmp_path, capsys):
    attribution = load("attribution")
    out = tmp_path / "attribution.png"
    sizes = ["--samples", "150", "--steps", "200", "--groups", "12", "--size", "8", "--batch", "25"]
    rows = attribution.main([*sizes, "--out", str(out)])
    smooth, scores, _, _, correlation = rows["smooth"]
    assert smooth.smoothness > 0.9
    assert not smooth.warnings
    assert correlation > 0.9
    assert scores.shape == (150,)
    assert rows["not smooth"][0].smoothness < smooth.smoothness - 0.2
    assert "Warning: the training is not smooth in x" in capsys.readouterr().out
    assert out.stat().st_size > 10_000


@pytest.mark.slow
def test_weak_labels_are_weighed_under_a_bilstm(rated, tmp_path, capsys):
    example, out = load("weak_labels"), tmp_path / "weak.png"
    small = ["--train", "200", "--outer", "4", "--training", "60", "--hidden", "4", "--learners", "bilstm"]
    rows = example.main(["--data", str(rated), "--kind", "amazon", "--seeds", "1", *small, "--out", str(out)])["bilstm"]
    assert sum("one step" in name for name in rows) == 2
    assert sum("SOBA" in name for name in rows) == 1
    assert all(0 <= value <= 1 for (value,) in rows.values())
    assert "AUC of wrong labels" in capsys.readouterr().out
    assert out.stat().st_size > 10_000


@pytest.mark.slow
def test_wrongly_inherited_labels_are_found(rated, tmp_path, capsys):
    example, out = load("label_inheritance"), tmp_path / "inheritance.png"
    rows = example.main(["--data", str(rated), "--seeds", "1", "--steps", "20", "--training", "4", "--out", str(out)])
    # Sentences here are words drawn at random: which of them are wrong, few features say (.59 on one machine).
    assert rows["weights per sentence"][0][-1] > 0.65
    assert rows["weights by features"][0][-1] > 0.5
    assert "inherit a wrong label" in capsys.readouterr().out
    assert out.stat().st_size > 10_000


def test_invented_questions_have_their_answers_and_parts_share_no_article():
    example = load("reading_sources")
    questions = example.invented(8)
    assert len(questions) == 48
    assert all(each.context[each.start :].startswith(each.answers[0]) for each in questions)
    args = example.argparse.Namespace(gaps=2, items=30, few=5, validation=9, test=9)
    items, sources, validation, test = example.draw_parts(questions, 0, args)
    assert np.bincount(sources)[4] == 5
    assert len(items) == len(sources) == 35
    contexts = [{each.context for each in part} for part in (items, validation, test)]
    assert not contexts[0] & contexts[1]
    assert not contexts[1] & contexts[2]


@pytest.mark.slow
def test_sources_of_questions_are_weighed_under_a_reader(tmp_path, capsys):
    example, out = load("reading_sources"), tmp_path / "reading.png"
    small = [
        "--paragraphs",
        "40",
        "--items",
        "100",
        "--few",
        "20",
        "--validation",
        "40",
        "--test",
        "40",
        "--seeds",
        "1",
    ]
    rows, paths = example.main([*small, "--outer", "12", "--training", "40", "--width", "8", "--out", str(out)])
    assert paths.shape == (1, 13, 5)
    assert (paths[:, 0] == 0.5).all()
    assert ((paths[:, -1] > 0) & (paths[:, -1] < 1)).all()
    assert rows["few and validation questions"][0, 0] > rows["not trained"][0, 0]
    assert "questions k times" in capsys.readouterr().out
    assert out.stat().st_size > 10_000


def tiny_lives():
    """A small grid's trainings, and the return of one training as a function of x, its draws given."""
    rl = load("meta_gradient_rl")
    study = rl.Study(rl.grid(side=3, horizon=6), steps=6, episodes=4, lifetimes=2)
    return rl, study, study.start(jax.random.key(0))


def test_the_metagradient_of_a_policys_training_is_that_of_its_draws(x64):
    """Against central differences: trajectories are drawn as they are, so that no action may change between them."""
    rl, study, ys = tiny_lives()
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), study.point(intrinsic=True))
    x["intrinsic"] = 0.1 * jax.random.normal(jax.random.key(1), x["intrinsic"].shape)
    ys = jnp.asarray(ys, jnp.float64)
    of = value_and_hypergradient(study.problem, rl.Unrolled(), study.training)
    at = jax.jit(lambda x: of(x, ys, key=5))
    gradient = at(x).gradient
    for name, leaf in x.items():
        direction = {k: jnp.zeros_like(v) for k, v in x.items()} | {
            name: jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape))
        }
        h = 1e-6
        up, down = (at(jax.tree.map(lambda a, d: a + s * h * d, x, direction)).value for s in (1, -1))
        slope = float(jnp.sum(gradient[name] * direction[name]))
        assert abs(slope) > 1e-5
        assert slope == pytest.approx(float(up - down) / (2 * h), rel=1e-5), name


def test_a_policys_exact_return_is_what_its_episodes_bring():
    rl, study, ys = tiny_lives()
    y = jax.random.normal(jax.random.key(2), ys[0].shape)
    _, _, rewards, _ = rl.drawn(study.task, y, jax.random.key(3), 20_000)
    assert float(study.task.exact(y)) == pytest.approx(float(rewards.sum() / 20_000), abs=0.01)


@pytest.mark.slow
def test_a_learnt_reward_teaches_sooner_than_fixed_numbers(tmp_path, capsys):
    rl, out = load("meta_gradient_rl"), tmp_path / "rl.png"
    found = rl.main(["--tasks", "grid", "--seeds", "1", "--outer", "30", "--out", str(out)])
    ends = {line: curves[:, -1].mean() for line, curves in found["grid"][0].items()}
    assert ends["learnt numbers and reward"] > ends["fixed, best of 27"] > ends["fixed"]
    assert "updates of 8 episodes" in capsys.readouterr().out
    assert out.stat().st_size > 10_000
