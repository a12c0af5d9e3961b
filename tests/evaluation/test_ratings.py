"""rate_build and rate_score: blindness, controls, merging, rates, and the files written."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import main
from imagen_jax.evaluation.raters import build, score, tables
from imagen_jax.evaluation.raters.studies import names_people
from imagen_jax.evaluation.samples import EvaluationError

ROWS = [
    {"prompt": f"{who} number {i}", "category": category}
    for category, who in (("Colors", "a man"), ("Text", "a sign"))
    for i in range(6)
]
DARK, LIGHT = 40, 220


@pytest.fixture
def study(write_samples, tmp_path):
    """Key and folder of a DrawBench study of 12 prompts, two images each."""
    a = write_samples("a", ROWS, level=DARK, count=2)
    b = write_samples("b", ROWS, level=LIGHT, count=2)
    out = tmp_path / "study"
    key = build.build(a, [b], str(out), study="drawbench", names=("mine", "theirs"), seed=1)
    return key, out


def answer(key, rater, prefers, folder, *, attentive=True, saved="2026-01-01T00:00:00Z"):
    """A result file of a rater who answers every question of an item by `prefers(item)`."""
    answers = []
    for number, item in enumerate(key["items"]):
        for question in key["questions"]:
            if item["control"]:
                given = item["control"][question]
                if not attentive:
                    given = {"left": "right", "right": "left"}[given]
            else:
                preferred = prefers(item)
                # A single image has no side: its answer is unchanged.
                given = dict(zip(item["of"], ("left", "right"), strict=False)).get(
                    preferred, preferred
                )
            answers.append({"item": number, "question": question, "answer": given})
    path = folder / f"{rater}_{saved[:10]}.json"
    content = {"study": key["id"], "rater": rater, "saved": saved, "answers": answers}
    path.write_text(json.dumps(content))
    return path


def test_the_page_reveals_nothing(study):
    key, out = study
    html = (out / "page" / "index.html").read_text()
    assert not any(word in html for word in ("mine", "theirs", "control", "http:", "https:"))
    files = sorted((out / "page" / "pictures").iterdir())
    assert len(files) == 4 * len(key["items"])
    for file in files:
        with Image.open(file) as image:
            assert not image.info, "metadata may name the checkpoint"
    # Neither the file name nor the side of an image depends on its folder.
    sides = [item["of"] for item in key["items"] if item["of"]]
    assert sides.count(["A", "B"]) == sides.count(["B", "A"]) == 6
    numbers = [int(n[:5]) for item in key["items"] for side in item["pictures"] for n in side]
    assert sorted(numbers) == list(range(len(files))) and numbers != sorted(numbers)


def test_the_key_matches_the_images(study):
    key, out = study
    levels = {"A": DARK, "B": LIGHT}
    for item in key["items"]:
        for side, names in enumerate(item["pictures"]):
            for name in names:
                pixels = np.asarray(Image.open(out / "page" / "pictures" / name))
                if item["of"]:
                    assert np.all(pixels == levels[item["of"][side]])
                else:
                    expected = item["control"]["fidelity"] == ("left", "right")[side]
                    assert (pixels.std() < 1) == expected
    controlled = {item["category"] for item in key["items"] if item["control"]}
    assert controlled == {"Colors", "Text"}


def test_the_seed_is_all_that_order_depends_on(write_samples, tmp_path):
    a, b = write_samples("a", ROWS), write_samples("b", ROWS)
    keys = [
        build.build(a, [b], str(tmp_path / f"s{i}"), study="drawbench", names="AB", seed=seed)
        for i, seed in enumerate((5, 5, 6))
    ]
    assert keys[0] == keys[1] and keys[0]["items"] != keys[2]["items"]


def test_rates_exclusions_and_files(study, tmp_path):
    key, out = study
    results = tmp_path / "results"
    results.mkdir()
    for number in range(4):
        # Everyone prefers A for signs; of men half say A, half B, and one in four is indifferent.
        def likes(item, number=number):
            return "A" if item["category"] == "Text" else ("A", "B", "indifferent", "A")[number]

        answer(key, f"r{number}", likes, results)
    answer(key, "careless", lambda item: "B", results, attentive=False)
    code = main.main(
        ["evaluate", "rate_score", f"--key={out / 'key.json'}", f"--results={results}"]
        + [f"--out={tmp_path / 'scores'}"]
    )
    assert code == 0
    card = json.loads((tmp_path / "scores" / "ratings.json").read_text())
    assert card["raters"] == 4
    assert card["excluded"] == {"careless": "0 of 10 control items as expected"}
    groups = card["comparisons"][0]["questions"]["fidelity"]["groups"]
    assert list(groups) == ["all", "no people", "Colors", "Text"]
    rates = {g: {k: v["mean"] for k, v in e["rates"].items()} for g, e in groups.items()}
    assert rates["Text"] == rates["no people"] == {"A": 1.0, "indifferent": 0.0, "B": 0.0}
    assert rates["Colors"] == {"A": 0.5, "indifferent": 0.25, "B": 0.25}
    assert rates["all"] == {"A": 0.75, "indifferent": 0.125, "B": 0.125}
    assert groups["all"]["ratings"] == 48 and groups["Text"]["prompts"] == 6
    for entry in groups.values():
        for rate in entry["rates"].values():
            assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
    table = (tmp_path / "scores" / "ratings.md").read_text()
    assert "| Colors | 50.0 (" in table and "Excluded: careless" in table
    root = ET.parse(tmp_path / "scores" / "alignment.svg").getroot()
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Colors", "mine", "theirs"} <= set(texts)


def test_the_file_saved_last_counts(study, tmp_path):
    key, out = study
    later = answer(key, "r", lambda item: "A", tmp_path, saved="2026-02-01T10:00:00+02:00")
    earlier = answer(key, "r", lambda item: "B", tmp_path, saved="2026-01-31T10:00:00Z")
    for order in ([later, earlier], [earlier, later]):
        card = score.score(str(out / "key.json"), order)
        assert (
            card["comparisons"][0]["questions"]["fidelity"]["groups"]["all"]["rates"]["A"]["mean"]
            == 1
        )
        assert card["raters"] == 1


def test_a_rater_without_control_answers_is_excluded(study, tmp_path):
    key, out = study
    path = answer(key, "r", lambda item: "A", tmp_path)
    result = json.loads(path.read_text())
    result["answers"] = [a for a in result["answers"] if not key["items"][a["item"]]["control"]]
    path.write_text(json.dumps(result))
    with pytest.raises(EvaluationError, match="no rater counts.*no control item answered"):
        score.score(str(out / "key.json"), [path])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"study": "0"}, "is of study 0, the key of"),
        ({"rater": " "}, "must be a name"),
        ({"saved": "yesterday"}, "not a result file"),
        ({"answers": 3}, "not a result file"),
        ({"answers": [3]}, "lacks"),
        ({"answers": [{"item": 99, "question": "fidelity", "answer": "left"}]}, "item=99 must be"),
        ({"answers": [{"item": 0, "question": "fidelty", "answer": "left"}]}, "fidelity"),
        ({"answers": [{"item": 0, "question": "fidelity", "answer": "A"}]}, "left"),
    ],
)
def test_invalid_result_files_are_rejected(study, tmp_path, capsys, change, says):
    key, out = study
    path = answer(key, "r", lambda item: "A", tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    flags = [f"--key={out / 'key.json'}", f"--results={path}", f"--out={tmp_path / 'x'}"]
    assert main.main(["evaluate", "rate_score", *flags]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_yes_somewhat_no(write_samples, tmp_path):
    a, b = write_samples("a", ROWS), write_samples("b", ROWS)
    out = tmp_path / "s"
    key = build.build(a, [b], str(out), study="alignment", names=("mine", "original"))
    words = {"A": "somewhat", "B": "yes"}
    for rater in ("r1", "r2"):
        answer(key, rater, lambda item: words[item["of"][0]], tmp_path)
    card = score.score(str(out / "key.json"), sorted(tmp_path.glob("r*.json")))
    rates = card["comparisons"][0]["questions"]["description"]["groups"]["all"]["rates"]
    assert (rates["A"]["mean"], rates["B"]["mean"]) == (0.5, 1.0)
    controls = [item for item in key["items"] if item["control"]]
    for item in controls:
        pixels = np.asarray(Image.open(out / "page" / "pictures" / item["pictures"][0][0]))
        named = item["prompt"].split()[2]
        same = tuple(pixels[0, 0]) == build.PLAIN_COLORS[named]
        assert item["control"]["description"] == ("yes" if same else "no")


def test_agreement_as_published():
    """Krippendorff 2011, section C: four observers, twelve units, nominal alpha .743."""
    nan = np.nan
    data = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
            [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
        ]
    )
    assert score.agreement(data)["alpha"] == pytest.approx(0.743, abs=5e-4)
    assert score.agreement(data[:1]) == {"pairs": None, "alpha": None}
    assert score.agreement(np.ones((3, 3)))["pairs"] == 1


def test_people():
    assert names_people("Two Men, and a dog.") and names_people("a tennis player")
    assert not names_people("a mango on a boyish mannequin")


def test_folders_that_do_not_match_are_rejected(write_samples, tmp_path):
    a = write_samples("a", ROWS)
    b = write_samples("b", [{"prompt": "another"}])
    with pytest.raises(EvaluationError, match="no prompt .* in common"):
        build.build(a, [b], str(tmp_path / "s"), study="drawbench", names="AB")
    with pytest.raises(EvaluationError, match="no file"):
        build.build(a, [str(tmp_path)], str(tmp_path / "s"), study="drawbench", names="AB")
    build.build(a, [a], str(tmp_path / "s"), study="drawbench", names="AB")
    with pytest.raises(EvaluationError, match="holds a study already"):
        build.build(a, [a], str(tmp_path / "s"), study="drawbench", names="AB")


GUESSES = {
    "drawbench": ("left", "indifferent", "right"),
    "photorealism": ("left", "right"),
    "alignment": ("yes", "somewhat", "no"),
}


@pytest.mark.parametrize("kind", GUESSES)
@pytest.mark.parametrize("manner", ["any answer", "one of two answers", "always the first"])
def test_a_rater_who_guesses_is_excluded(write_samples, tmp_path, kind, manner):
    """Of 400 raters who do not look, about 3% or fewer count; an attentive one always does."""
    a, b = write_samples("a", ROWS[:4]), write_samples("b", ROWS[:4])
    key = build.build(a, [b], str(tmp_path / "s"), study=kind, names="AB", seed=2)
    rng, choices = np.random.default_rng(0), GUESSES[kind]
    if manner == "one of two answers":
        choices = (choices[0], choices[-1])

    def answers(attentive: bool) -> dict:
        first = choices[0]
        return {
            ("r", number, question): item["control"][question]
            if attentive and item["control"]
            else (first if manner == "always the first" else str(rng.choice(choices)))
            for number, item in enumerate(key["items"])
            for question in key["questions"]
        }

    passed = sum(not score._excluded(key, answers(False)) for _ in range(400))
    assert passed <= 400 * 0.06
    assert score._excluded(key, answers(True)) == {}


def test_one_control_item_proves_nothing(write_samples, tmp_path):
    a, b = write_samples("a", ROWS[:4]), write_samples("b", ROWS[:4])
    key = build.build(a, [b], str(tmp_path / "s"), study="photorealism", names="AB", seed=2)
    number = next(i for i, item in enumerate(key["items"]) if item["control"])
    answer = key["items"][number]["control"]["photorealism"]
    excluded = score._excluded(key, {("r", number, "photorealism"): answer})
    assert excluded == {"r": "1 of 1 control items as expected, as guesses give in 50% of cases"}


FIVE = [{"prompt": f"prompt {i}", "category": "Text"} for i in range(5)]
ONE = [{"prompt": "alone", "category": "Colors"}]


@pytest.fixture
def several(write_samples, tmp_path):
    """A study of `mine` against two models; the second lacks a category."""
    mine, first = (write_samples(n, FIVE + ONE, level=DARK) for n in ("mine", "first"))
    second = write_samples("second", FIVE, level=LIGHT)
    flags = [f"--samples_a={mine}", f"--samples_b={first},{second}", "--names=mine,GLIDE,DALL-E 2"]
    flags += ["--study=drawbench", f"--out={tmp_path / 'study'}"]
    assert main.main(["evaluate", "rate_build", *flags]) == 0
    return json.loads((tmp_path / "study" / "key.json").read_text())


def test_one_model_against_several(several, tmp_path):
    pairs = [frozenset(item["of"]) for item in several["items"] if item["of"]]
    assert pairs.count(frozenset("AB")) == 6 and pairs.count(frozenset("AC")) == 5
    results = tmp_path / "results"
    results.mkdir()
    for number in range(3):
        # Against the first model one of three raters prefers mine, against the second everyone.
        def likes(item, number=number):
            return "A" if "C" in item["of"] or number == 0 else "B"

        answer(several, f"r{number}", likes, results)
    out = tmp_path / "scores"
    flags = [f"--key={tmp_path / 'study' / 'key.json'}", f"--results={results}", f"--out={out}"]
    assert main.main(["evaluate", "rate_score", *flags]) == 0
    card = json.loads((out / "ratings.json").read_text())
    assert [c["names"] for c in card["comparisons"]] == [["mine", "GLIDE"], ["mine", "DALL-E 2"]]
    of_first, of_second = (c["questions"]["fidelity"]["groups"] for c in card["comparisons"])
    assert of_first["all"]["rates"]["A"]["mean"] == pytest.approx(1 / 3)
    assert of_first["all"]["rates"]["B"]["mean"] == pytest.approx(2 / 3)
    assert of_second["all"]["rates"]["A"]["mean"] == 1 and of_second["all"]["prompts"] == 5
    assert list(of_first) == ["all", "Colors", "Text"] and "Colors" not in of_second
    names = {path.name for path in out.iterdir()} - {"ratings.json", "ratings.md"}
    questions = ("alignment", "fidelity")
    assert names == {"comparisons.svg"} | {f"{q}_{i}.svg" for q in questions for i in (1, 2)}
    text = svg_texts(out / "comparisons.svg")
    assert {"GLIDE: fidelity", "DALL-E 2: alignment", "mine", "the other"} <= text
    assert "mine and other models, 95% intervals" in text


def svg_texts(path) -> set[str]:
    root = ET.parse(path).getroot()
    return {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}


def test_categories_with_too_few_answers_are_said_to_be_so(several, tmp_path):
    results = [answer(several, f"r{n}", lambda item: "A", tmp_path) for n in range(3)]
    card = score.score(str(tmp_path / "study" / "key.json"), results)
    groups = card["comparisons"][0]["questions"]["fidelity"]["groups"]
    assert {name: entry["too_few"] for name, entry in groups.items()} == {
        "all": False,
        "Colors": True,  # one prompt
        "Text": False,
    }
    tables.write(card, str(tmp_path / "scores"))
    assert (
        "| Colors | 100.0 (too few answers) |" in (tmp_path / "scores" / "ratings.md").read_text()
    )
    assert "Colors (too few answers)" in svg_texts(tmp_path / "scores" / "fidelity_1.svg")
    alone = score.score(str(tmp_path / "study" / "key.json"), results[:1])
    groups = alone["comparisons"][0]["questions"]["fidelity"]["groups"]
    assert all(entry["too_few"] for entry in groups.values()), "one rater"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--study=photorealism", "--names=a,b,c"], "must be one folder with --study=photorealism"),
        (["--study=drawbench", "--names=a,b"], "--names=a,b must be 3 names, all different"),
        (["--study=drawbench", "--names=a,b,B"], "must be 3 names, all different"),
    ],
)
def test_several_models_that_cannot_be_compared(write_samples, tmp_path, capsys, flags, says):
    folder = write_samples("a", ROWS)
    flags = [*flags, f"--samples_a={folder}", f"--samples_b={folder},{folder}"]
    assert main.main(["evaluate", "rate_build", *flags, f"--out={tmp_path / 's'}"]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
