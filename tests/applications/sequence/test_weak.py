"""Texts, files and weak labels: closed forms, differences, and every bad input by its name."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from archives import packed

from bilevel import datasets, solve, solvers
from bilevel.applications.sequence import (
    AttentiveBiLSTM,
    BiDAF,
    NGrams,
    Question,
    Vocabulary,
    auc,
    best_span,
    by_document,
    cloze,
    cross_entropy,
    encode_characters,
    encode_questions,
    exact_match,
    f1,
    in_documents,
    inherited_labels,
    linear_classifier,
    one_hot,
    rule_scores,
    semeval_irony,
    snippets,
    span_loss,
    squad,
    tokenise,
    weak_labels,
    weighted,
    wordllama_table,
)
from bilevel.hypergradients import Implicit, Unrolled
from bilevel.linear import Dense
from bilevel.lower import GradientDescent, Newton

TEXTS = ["A good film.", "A bad film!", "good, good", "not bad at all"]


def close(ours, theirs, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)


# Texts.


def test_tokens_are_words_signs_and_emoticons():
    assert tokenise("I can't: see https://t.co/x @You #Irony :-) 3.5!") == [
        "i", "can't", ":", "see", "<url>", "@you", "#irony", ":-)", "3", ".", "5", "!",
    ]  # fmt: skip
    assert tokenise("Über-gut") == ["über", "-", "gut"]


def test_vocabulary_has_rows_for_padding_and_the_unknown():
    vocabulary = Vocabulary.of(TEXTS, least=2)
    assert set(vocabulary.words) == {"good", "a", "film", "bad"} and vocabulary.words[0] == "good"
    ids, lengths = vocabulary.encode(["good luck", "film"], longest=5)
    assert ids.tolist() == [[2, 1], [vocabulary["film"], 0]] and lengths.tolist() == [2, 1]
    assert len(Vocabulary.of(TEXTS, least=1, most=3)) == 5
    with pytest.raises(ValueError, match=r"Texts \[1\] are empty \(1 of 2\): there is nothing to read"):
        vocabulary.encode(["good", "  "])
    with pytest.raises(ValueError, match=r"Texts \[1\] are no strings \(NoneType\)"):
        vocabulary.encode(["good", None])
    with pytest.raises(ValueError, match="One string was given"):
        vocabulary.encode("good")
    with pytest.raises(ValueError, match=r"each token once; \['a'\] stand there more often"):
        Vocabulary(("a", "b", "a"))


def test_characters_are_printable_ones_in_lower_case():
    ids, lengths = encode_characters(["Aé", "0"])
    assert ids.tolist() == [[12, 1], [2, 0]] and lengths.tolist() == [2, 1]
    with pytest.raises(ValueError, match="Text 0 has the unknown characters 'ßé': the 102 rows are those of string"):
        encode_characters(["aßé", "b"], unknown="refuse")
    with pytest.raises(ValueError, match="Text 1 has the unknown characters 'дж' and no other"):
        encode_characters(["a", "дж"])
    with pytest.raises(ValueError, match="unknown='skip' was given"):
        encode_characters(["a"], unknown="skip")


def test_ngrams_are_scikit_learns_weights():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    grams = NGrams.of(TEXTS, 2, least=1)
    inputs = grams.encode(TEXTS)
    theirs = text.TfidfVectorizer(tokenizer=tokenise, token_pattern=None, lowercase=False, ngram_range=(1, 2))
    dense = np.asarray(theirs.fit_transform(TEXTS).todense())
    ours = np.zeros((4, len(grams)))
    np.add.at(ours, (np.arange(4)[:, None], inputs["grams"]), inputs["values"])
    columns = [theirs.vocabulary_[gram] for gram in grams.grams]
    close(ours[:, 1:], dense[:, columns], 1e-6)
    params = {"kernel": jnp.arange(float(len(grams)))[:, None], "bias": jnp.array([0.5])}
    close(linear_classifier(params, inputs)[:, 0], ours @ np.arange(len(grams)) + 0.5, 1e-4)
    with pytest.raises(ValueError, match="to a classifier of 3: the dictionary does not match it"):
        linear_classifier({"kernel": jnp.zeros((3, 1)), "bias": jnp.zeros(1)}, inputs)
    with pytest.raises(ValueError, match="No n-gram stands in 9 of 4 texts; lower least="):
        NGrams.of(TEXTS, least=9)


def wordllama_folder(folder, rows=6, name="embedding.weight"):
    table = np.arange(12, dtype=np.float16).reshape(6, 2)
    header = json.dumps({name: {"dtype": "F16", "shape": [6, 2], "data_offsets": [0, 24]}}).encode()
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizers").mkdir(exist_ok=True)
    content = len(header).to_bytes(8, "little") + header + table.tobytes()
    (folder / "weights/l2_supercat_256.safetensors").write_bytes(content)
    words = ["▁", "▁go", "od", "▁good", "b", "▁film"][:rows] + ["x"] * (rows > 6)
    vocab = {word: k for k, word in enumerate(words)}
    (folder / "tokenizers/l2_supercat_tokenizer_config.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    return table.astype(np.float32)


def test_static_vectors_are_means_of_pieces(tmp_path):
    table = wordllama_folder(tmp_path)
    found = wordllama_table(Vocabulary(("good", "bod", "qq")), tmp_path)
    close(found, [[0, 0], table.mean(0), table[3], (table[4] + table[2]) / 2, table.mean(0)], 1e-6)
    with pytest.raises(datasets.DatasetNotFoundError, match=r"pip install wordllama==0\.4\.0\.post1"):
        wordllama_table(Vocabulary(("good",)), tmp_path / "nowhere")
    wordllama_folder(tmp_path, rows=7)
    with pytest.raises(ValueError, match=r"dictionary of 7 entries does not match its embeddings of shape \(6, 2\)"):
        wordllama_table(Vocabulary(("good",)), tmp_path)
    wordllama_folder(tmp_path, name="other")
    with pytest.raises(ValueError, match=r"has other, and no 'embedding\.weight'"):
        wordllama_table(Vocabulary(("good",)), tmp_path)


# Files.

RULE = """
class SentimentIntensityAnalyzer:
    def __init__(self):
        from inspect import getsourcefile
        import os
        folder = os.path.dirname(os.path.abspath(getsourcefile(lambda: 0)))
        with open(os.path.join(folder, "vader_lexicon.txt")) as file:
            self.words = dict(line.split() for line in file)
    def polarity_scores(self, text):
        total = sum(float(self.words.get(word, 0)) for word in text.lower().split())
        return {"compound": total, "neg": 0.25, "neu": 0.5, "pos": 0.25}
"""
RATED = b"1_1\t0.5\ta good film\r\n1_2\t-0.25\ta bad\tone\r\n2_1\t0\tfilm\r\n"


def distribution(path, rated=RATED, rule=True):
    """A source distribution as PyPI has it, with another rule and three snippets."""

    inner = packed({"hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt": rated})
    top = "vaderSentiment-3.3.2/"
    files = {f"{top}additional_resources/hutto_ICWSM_2014.tar.gz": inner}
    if rule:
        files[f"{top}vaderSentiment/vaderSentiment.py"] = RULE.encode()
        files[f"{top}vaderSentiment/vader_lexicon.txt"] = b"good 0.5\nbad -0.5\n"
        files[f"{top}vaderSentiment/emoji_utf8_lexicon.txt"] = b""
    path.write_bytes(packed(files))
    return path


@pytest.mark.parametrize("unpacked", [False, True])
def test_snippets_and_rule_come_from_the_source_distribution(tmp_path, unpacked):
    path = distribution(tmp_path / "vaderSentiment-3.3.2.tar.gz")
    if unpacked:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        path = tmp_path / "vaderSentiment-3.3.2"
    found = snippets("amazon", path)
    assert found.texts == ["a good film", "a bad\tone", "film"]
    assert found.human.tolist() == [0.5, -0.25, 0] and found.documents.tolist() == [0, 0, 1]
    scores = rule_scores(found.texts, path)
    assert scores.compound.tolist() == [0.5, -0.5, 0] and scores.labels.tolist() == [1, 0, 0]
    close(scores[[1]].features, [[1, -1, -0.5, 0.5, 0.5]], 0)


def test_snippets_are_found_in_the_environments_folder(tmp_path, monkeypatch):
    distribution(tmp_path / "vaderSentiment-3.3.2.tar.gz")
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    assert len(snippets("amazon").texts) == 3
    monkeypatch.delenv("BILEVEL_DATA")
    with pytest.raises(datasets.DatasetNotFoundError, match=r"neither path= nor BILEVEL_DATA was given\. Get"):
        snippets("amazon")


@pytest.mark.parametrize(
    ("rated", "said"),
    [
        (b"1\t0.5\n", "line 1 has 2 columns, '1\\\\t0.5'; 3 separated by tabs were expected: id, mean rating, text"),
        (b"1\t0.5\tx\n2\tgood\ty\n", "line 2: the mean rating 'good' is no number"),
        (b"1\t0.5\t \n", "line 1: the text is empty. Take the line out"),
    ],
)
def test_a_bad_line_of_snippets_is_named(tmp_path, rated, said):
    with pytest.raises(ValueError, match=said):
        snippets("amazon", distribution(tmp_path / "x.tar.gz", rated))


def test_a_bad_distribution_is_named(tmp_path):
    path = distribution(tmp_path / "x.tar.gz", rule=False)
    with pytest.raises(datasets.DatasetNotFoundError, match=r"has no vaderSentiment/vaderSentiment.py"):
        rule_scores(["a"], path)
    with pytest.raises(datasets.DatasetNotFoundError, match=r"has no hutto_ICWSM_2014/movieReview"):
        snippets("movie", path)
    with pytest.raises(ValueError, match="kind='films' was given; there are 'movie', 'nyt', 'amazon', 'tweets'"):
        snippets("films", path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no archive of a source distribution"):
        snippets("amazon", path)


def test_semeval_file_is_read_and_what_is_wrong_with_it_named(tmp_path):
    file = tmp_path / "train.txt"
    head = "Tweet index\tLabel\tTweet text\n"
    file.write_text(f"{head}1\t1\tSo \t nice\n\n2\t0\tgood\n")
    assert semeval_irony(file) == (["So \t nice", "good"], pytest.approx([1, 0]))
    for content, classes, said in [
        (
            "Tweet index\tTweet text\n1\tx\n",
            2,
            "lacks the column.s. 'label'; its first line has 'tweet index', 'tweet text'",
        ),
        (f"{head}1\t2\tx\n", 2, "line 2: the label '2' is not among 0 to 1"),
        (f"{head}1\t4\tx\n", 4, "line 2: the label '4' is not among 0 to 3"),
        (f"{head}1\t1\n", 2, "line 2 has 2 columns"),
        (f"{head}1\t1\t \n", 2, "line 2: the text is empty"),
        (f"{head}1\t1\tx\n1\t0\ty\n", 2, "line 3: the index 1 stands in line 2 already"),
        (head, 2, "has a header and no tweet"),
        ("", 2, "lacks the column.s. 'tweet index', 'label', 'tweet text'"),
    ]:
        file.write_text(content)
        with pytest.raises(ValueError, match=said):
            semeval_irony(file, classes)
    with pytest.raises(FileNotFoundError, match="to be had from its organisers"):
        semeval_irony(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="classes=3 was given; task A has 2 and task B has 4"):
        semeval_irony(file, 3)


def squad_file(path, **changes):
    question = {"id": "q", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 4}], **changes}
    paragraph = {"context": "Yes Ada did.", "qas": [question]}
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [paragraph]}]}))
    return path


def test_squad_file_is_read_and_what_is_wrong_with_it_named(tmp_path):
    file = tmp_path / "q.json"
    (found,) = squad(squad_file(file))
    assert found == Question("q", "Who?", "Yes Ada did.", ("Ada",), 4, "T")
    for changes, said in [
        ({"answers": [{"text": "Ada", "answer_start": 3}]}, "'Ada' does not stand at character 3 .* where ' Ad' is"),
        ({"answers": []}, r"data\[0\].paragraphs\[0\].qas\[0\] has no answer"),
        ({"answers": [{"text": "Ada"}]}, r"answers\[0\] lacks the field 'answer_start'; it has 'text'"),
        ({"question": " "}, "question is empty"),
        ({"question": 3}, "question is a int; a str was expected"),
        ({"answers": [], "is_impossible": True}, "has no question with an answer"),
    ]:
        with pytest.raises(ValueError, match=said):
            squad(squad_file(file, **changes))
    file.write_text("{")
    with pytest.raises(ValueError, match=r"q.json is no JSON"):
        squad(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="lacks the field 'data'; it has a list"):
        squad(file)
    with pytest.raises(FileNotFoundError, match="Give the path of a JSON file"):
        squad(tmp_path / "none.json")


# Weak labels.


def small_problem(features=None, **options):
    rng = np.random.default_rng(0)
    X, C = rng.standard_normal((12, 3)), rng.standard_normal((5, 3))
    labels, human = (X[:, 0] > 0).astype(int), (C[:, 0] + C[:, 1] > 0).astype(int)
    classify = lambda y, inputs: (inputs @ y)[:, None]
    return weak_labels(classify, jnp.zeros(3), (X, labels), (C, human), features=features, decay=0.1, **options), (
        X,
        labels,
        C,
        human,
    )


@pytest.mark.parametrize("features", [None, 2])
def test_weak_labels_are_the_equations(features, x64):
    known = None if features is None else np.random.default_rng(1).standard_normal((12, 2))
    app, (X, labels, C, human) = small_problem(known)
    x = jnp.asarray(np.random.default_rng(2).standard_normal(app.x0.shape))
    y = jnp.array([0.3, -0.2, 0.5])
    w = 1 / (1 + np.exp(-np.asarray(x if known is None else known @ x)))
    entropy = lambda z, t: np.log1p(np.exp(-np.where(t == 1, z, -z)))
    below = (w * entropy(X @ y, labels)).mean() + 0.05 * (y @ y)
    levels = jax.jit(lambda x, y: (app.problem.full_lower()(x, y), app.problem.full_upper()(x, y), app.weights(x)))
    found = levels(x, y)
    close(found[0], below, 1e-12)
    close(found[1], entropy(C @ y, human).mean(), 1e-12)
    close(found[2], w, 1e-12)
    close(app.accuracy(x, y, (C, human)), ((C @ y > 0) == human).mean())
    recalls = [((C @ y > 0) == human)[human == c].mean() for c in (0, 1)]
    close(app.balanced_accuracy(x, y, (C, human)), np.mean(recalls))


def test_weights_descend_along_the_true_hypergradient(x64):
    """Of x by features: the implicit derivative, differences of the solved lower level, and unrolling agree."""
    known = np.random.default_rng(1).standard_normal((12, 2))
    app, _ = small_problem(known)
    x = np.array([0.4, -0.7])

    @jax.jit
    def after(x):
        lower = Newton()
        y = lower(app.problem.full_lower(), x, lower.init(app.y0)).y
        return app.problem.full_upper()(x, y)

    e = 1e-5
    difference = np.array([(after(x + e * d) - after(x - e * d)) / (2 * e) for d in np.eye(2)])
    step = lambda estimator, lower: solvers.HypergradientDescent(
        estimator, lower, upper_optimizer=1.0, warm_start=False
    )
    for estimator, lower, tolerance in (
        (Implicit(Dense()), Newton(), 1e-8),
        (Unrolled(), GradientDescent(1.0, steps=600), 1e-8),
    ):
        moved = solve(app.problem, x, app.y0, step(estimator, lower), steps=1).x
        close(x - moved, difference, tolerance)


def test_wrong_labels_get_less_weight():
    rng = np.random.default_rng(0)
    draw = lambda n: (lambda X: (X, (X[:, 0] > 0).astype(int)))(rng.standard_normal((n, 4)).astype(np.float32))
    (X, truth), clean, test = draw(120), draw(60), draw(200)
    weak, flipped = datasets.corrupt_labels(truth, 0.3, 2, 0)
    classify = lambda y, inputs: (inputs @ y)[:, None]
    app = weak_labels(classify, jnp.zeros(4), (X, weak), clean, test=test, decay=1e-2)
    solution = solve(app.problem, app.x0, app.y0, solvers.AID(), steps=30, metrics=app.metrics)
    assert auc(-np.asarray(app.weights(solution.x)), flipped) > 0.9
    assert solution.history["accuracy"][-1] > 0.93


def test_minibatches_weigh_the_samples_they_draw():
    app, _ = small_problem(batch=4, clean_batch=2)
    level = app.problem.draw_lower(3)
    samples, known = level.batch
    assert samples[0].shape == (4, 3)
    x = app.x0.at[known[0]].set(3.0)
    assert float(level(x, jnp.ones(3))) != float(level(app.x0, jnp.ones(3)))


def test_documents_are_means_of_their_sentences(x64):
    inputs, documents = np.arange(10.0).reshape(5, 2), np.array([7, 2, 7, 7, 2])
    arranged = by_document(inputs, documents)
    assert arranged["count"].tolist() == [2, 3]
    close(arranged["sentences"][0], [inputs[1], inputs[4], inputs[1]], 0)  # the first again, which no mean holds
    with pytest.raises(ValueError, match=r"Sentences of \[5\] rows were given with documents of type int64\[4\]"):
        by_document(inputs, documents[:4])
    classify = lambda y, inputs: (inputs @ y)[:, None] + 1
    found = in_documents(classify)(jnp.array([1.0, -2.0]), arranged)
    of_sentence = inputs @ [1, -2] + 1
    close(found[:, 0], [of_sentence[[1, 4]].mean(), of_sentence[[0, 2, 3]].mean()], 1e-12)
    app = inherited_labels(classify, jnp.zeros(2), (inputs, documents, [1, 0]), (inputs, documents, [0, 1]), decay=0.1)
    samples, _ = app.problem.lower_data
    assert samples[1].tolist() == [0, 1, 0, 0, 1]  # document 2 has label 1, document 7 label 0
    with pytest.raises(ValueError, match=r"Training labels of shape \(3,\) were given for 2 documents"):
        inherited_labels(classify, jnp.zeros(2), (inputs, documents, [1, 0, 1]), (inputs, documents, [0, 1]))


def test_a_weight_per_source():
    features = one_hot(np.array([0, 2, 0]))
    assert features.tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    loss = lambda y, samples: (samples - y) ** 2
    app = weighted(loss, jnp.zeros(()), np.array([1.0, 5.0, 1.2]), np.array([1.1]), features=features)
    x = jnp.array([2.0, 0.0, -2.0])
    close(app.weights(x), jax.nn.sigmoid(x)[np.array([0, 2, 0])], 1e-7)
    with pytest.raises(ValueError, match=r"Sources of type float64\[2\] were given; give whole numbers from 0 on"):
        one_hot([0.5, 1.0])


def test_labels_that_the_classifier_has_no_logit_for():
    X, linear = np.ones((6, 2)), lambda y, inputs: inputs @ y
    labels = np.array([0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match=r"The training labels go from 0 to 2, and there are 2 classes \(0 to 1\)"):
        weak_labels(linear, jnp.zeros((2, 1)), (X, labels), (X, labels))
    with pytest.raises(ValueError, match="The clean labels go from 0 to 3, and there are 3 classes"):
        weak_labels(linear, jnp.zeros((2, 3)), (X, labels), (X, labels // 2 * 3))
    with pytest.raises(ValueError, match="The labels go from 0 to 2, and there are 2 classes"):
        cross_entropy(jnp.ones((3, 1)), jnp.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"The sources go from 0 to 2, and there are 2 of them"):
        one_hot(np.array([0, 2]), 2)
    weak_labels(linear, jnp.zeros((2, 3)), (X, labels), (X, labels))


def test_weak_labels_say_what_is_wrong():
    classify = lambda y, inputs: (inputs @ y)[:, None]
    X, good = np.ones((4, 2)), np.array([0, 1, 0, 1])
    make = lambda labels=good, clean=good, **options: weak_labels(
        classify, jnp.zeros(2), (X, labels), (X, clean), **options
    )
    with pytest.raises(ValueError, match=r"Training inputs of \[4\] samples were given with labels of shape \(3,\)"):
        make(good[:3])
    with pytest.raises(ValueError, match=r"Training labels of type float64 .* `\(score > 0\).astype\(int\)`"):
        make(np.array([0.1, 0.2, -0.1, 0.3]))
    with pytest.raises(ValueError, match=r"Clean labels from -1 were given, first at \[1, 3\]; classes count from 0"):
        make(clean=np.array([1, -1, 1, -1]))
    with pytest.raises(
        ValueError, match=r"Features of shape \(3, 1\) were given for 4 training samples; give \(4, k\)"
    ):
        make(features=np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"The features of samples \[2\] have no finite value"):
        make(features=np.array([[1.0], [2], [np.nan], [3]]))
    with pytest.raises(ValueError, match="decay=-1 was given"):
        make(decay=-1)


def test_auc_is_the_share_of_pairs():
    rng = np.random.default_rng(0)
    scores, wrong = rng.integers(0, 5, 40), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[wrong] for b in scores[~wrong]]
    assert auc(scores, wrong) == pytest.approx(np.mean(pairs), abs=1e-12)
    with pytest.raises(ValueError, match="0 wrong and 3 right samples were given; some of each are needed"):
        auc([1, 2, 3], [False] * 3)


# Reading.


def test_em_and_f1_are_squads():
    assert exact_match("The  Eiffel Tower!", ["tower", "eiffel tower"]) == 1
    assert exact_match("Eiffel", ["eiffel tower"]) == 0
    assert f1("the big Eiffel Tower", ["eiffel tower", "x"]) == pytest.approx(2 * 2 / 5)
    assert f1("no", ["eiffel tower"]) == 0
    with pytest.raises(ValueError, match="give a sequence of the texts that count as right"):
        exact_match("a", "a")


def test_questions_point_at_their_answers():
    context = "In 1903, Marie Curie won a prize. It was worth 12 coins."
    made, sources = cloze([context], per_context=5)
    by = {}
    for question, source in zip(made, sources.tolist(), strict=True):
        assert context[question.start :].startswith(question.answers[0])
        assert "<blank>" in question.question
        by.setdefault(source, set()).add(question.answers[0])
    assert by[0] == {"Marie Curie"} and by[1] == {"12"} and by[2] == {"1903"} and by[3] == {"prize", "worth", "coins"}
    encoded = encode_questions(made, Vocabulary(("marie", "curie")))
    for k, question in enumerate(made):
        assert encoded.text(k, (encoded.first[k], encoded.last[k]), context) == question.answers[0]
    assert encoded.context.words[0, 3:5].tolist() == [2, 3]
    far = encode_questions(made, Vocabulary(()), longest=5)
    assert {made[k].answers[0] for k in far.kept} == {"1903", "Marie Curie"}
    with pytest.raises(ValueError, match="None of 1 questions has its answer in the first 2 words"):
        encode_questions(made[:1], Vocabulary(()), longest=2)
    with pytest.raises(ValueError, match="does not stand at 2"):
        encode_questions([made[0]._replace(start=2)], Vocabulary(()))
    with pytest.raises(ValueError, match=r"question 'x' \(0\) has no word"):
        encode_questions([made[0]._replace(name="x", question=" ")], Vocabulary(()))
    with pytest.raises(ValueError, match=r"templates=\('verb',\) was given; there are 'entity', 'number'"):
        cloze([context], templates=("verb",))


@pytest.mark.slow
def test_a_reader_reads_encoded_questions():
    made, _ = cloze(["In 1903, Marie Curie won a prize. It was worth 12 coins."])
    encoded = encode_questions(made, Vocabulary(("marie", "prize")))
    model = BiDAF(102, word_features=4, character_features=2, filters=3, hidden=2)
    table = jnp.ones((4, 4))
    samples = jax.tree.map(jnp.asarray, encoded.samples)
    reading = model(model.init(jax.random.key(0)), samples["context"], samples["question"], table=table)
    loss = span_loss(reading, samples["first"], samples["last"])
    assert loss.shape == (len(made),) and np.isfinite(np.asarray(loss)).all()
    assert best_span(reading.p1, reading.p2).shape == (len(made), 2)


# Real data, where the user has it.


def real(name):
    for folder in filter(None, (os.environ.get("BILEVEL_DATA"),)):
        for found in sorted(Path(folder).glob(f"{name}*")):
            return found
    pytest.skip(f"{name} is not shipped: put its package file into the folder that BILEVEL_DATA names "
                "(`pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2`)")  # fmt: skip


def test_the_real_snippets_have_their_numbers():
    path = real("vaderSentiment-3.3.2.tar.gz")
    assert [len(snippets(kind, path).texts) for kind in ("movie", "nyt", "amazon", "tweets")] == [
        10605,
        5190,
        3708,
        4200,
    ]
    amazon = snippets("amazon", path)
    opinion = np.abs(amazon.human) > 0.5
    scores = rule_scores(amazon.texts, path)
    covered = opinion & (scores.compound != 0)
    wrong = (scores.labels != (amazon.human > 0))[covered].mean()
    assert wrong == pytest.approx(0.190, abs=0.001)  # the share on the reference page


def test_the_bilstm_reads_what_the_vocabulary_encodes():
    vocabulary = Vocabulary.of(TEXTS, least=1)
    ids, lengths = vocabulary.encode(TEXTS)
    model = AttentiveBiLSTM(len(vocabulary), 4, 3, layers=1, trained=True)
    params = jax.jit(model.init)(jax.random.key(0))
    assert jax.jit(model)(params, jnp.asarray(ids), jnp.asarray(lengths)).shape == (4, 1)
    other = Vocabulary.of(TEXTS, least=2)
    small = AttentiveBiLSTM(len(other), 4, 3, layers=1, trained=True)
    with pytest.raises(ValueError, match="The tokens go from 0 to 11, and there are 6 in"):
        small(jax.jit(small.init)(jax.random.key(0)), jnp.asarray(ids), jnp.asarray(lengths))
