"""The page of a survey: whole, closed in itself, escaped, told from the data, small, and the same every time."""

import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from sinks.analysis.findings import Finding
from sinks.analysis.measures.sink_rate import SinkRate, SinkRates
from sinks.analysis.survey import Survey
from sinks.report.scan.attention import bare_layers
from sinks.report.scan.causes import ordered
from sinks.report.scan.charts import figures, ramp_variables
from sinks.report.scan.markup import PAINTS, escape
from sinks.report.scan.page import DARK, atlas, html_card, page, page_name
from sinks.report.scan.saved import to_plain
from sinks.report.scan.words import DEFINITIONS, dependence, headline, signatures
from tests.report.fake_survey import about, bare_survey, fake_about, fake_advice, fake_interventions, fake_survey

VOID = {"meta", "link", "br", "hr", "img", "input"}
PARTS = ("sink_rates", "entropy", "mixing", "semantics", "repetition", "interventions", "advice")


class Reader(HTMLParser):
    """Collects tags, attributes and words, and checks that whatever opens is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, attribute: str) -> list[str]:
        return [found[attribute] for _, found in self.tags if attribute in found]


SMALL = fake_survey(layers=4, heads=2)
WHOLE = page(fake_survey())
"""One page for the tests that only look."""


def shown(survey: Survey) -> str:
    return Reader(page(survey)).text


def rates_of(survey: Survey) -> SinkRates:
    assert survey.sink_rates is not None
    return survey.sink_rates


def all_pages() -> dict[str, str]:
    many = [fake_survey(), bare_survey(), fake_survey(layers=3, heads=2, about=fake_about("tiny"))]
    return {"page": WHOLE, "bare": page(bare_survey()), "atlas": atlas(many), "card": html_card(fake_survey())}


@pytest.mark.parametrize(("name", "text"), all_pages().items(), ids=list(all_pages()))
def test_a_page_is_well_formed_and_loads_nothing(name: str, text: str):
    reader = Reader(text)
    assert reader.open == []
    ids = Counter(reader.values("id"))
    assert [one for one, count in ids.items() if count > 1] == []
    used = re.findall(r"url\(#([^)]+)\)", text) + [to[1:] for to in reader.values("href") if to.startswith("#")]
    assert set(used) - set(ids) == set()
    assert reader.values("src") == []
    assert not {tag for tag, _ in reader.tags} & {"link", "img", "iframe", "object", "image"}
    assert all(
        not to.startswith(("http", "//")) for tag, found in reader.tags for to in [found.get("href", "")] if tag != "a"
    )
    assert "@import" not in text and "http" not in re.sub(r"<text.*?</text>", "", text)
    assert not re.search(r"url\((?!#)", text)


def test_the_reader_of_these_tests_sees_what_is_wrong():
    with pytest.raises(AssertionError, match="closes"):
        Reader("<div><p></div>")
    assert Reader("<div>").open == ["div"]


def test_the_same_survey_gives_the_same_bytes():
    assert page(fake_survey()) == WHOLE


def test_a_drawing_carries_no_date_and_no_fixed_colour():
    assert "dc:date" not in WHOLE and "<metadata" not in WHOLE
    inside = "".join(re.findall(r"<svg class=\"plot\".*?</svg>", WHOLE, re.S))
    bare = re.sub(r"var\(--[\w-]+(, #[0-9a-f]{6})?\)", "", inside)
    assert re.findall(r"#[0-9a-f]{6}\b", bare) == []
    assert "font-family" not in inside


def test_every_colour_has_a_dark_twin():
    assert DARK.keys() == PAINTS.keys()
    light, dark = ramp_variables(dark=False), ramp_variables(dark=True)
    assert re.findall(r"--\w+", light) == re.findall(r"--\w+", dark)
    used = {name for name in re.findall(r"var\(--(\w+)", WHOLE)}
    defined = set(re.findall(r"--(\w+):", WHOLE))
    assert used <= defined


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_words_can_be_read_on_their_ground(ground: str):
    colours = PAINTS if ground == "light" else DARK
    for paint, least in (("ink", 7), ("faint", 4.5), ("blue", 4.5)):
        assert contrast(colours[paint], colours["paper"]) >= least, paint


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of luminances."""
    found = []
    for colour in (one, other):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        found.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(found) + 0.05) / (min(found) + 0.05)


# What comes from outside


def test_names_and_tokens_are_escaped():
    survey = fake_survey(about=fake_about('<script>alert("x")</script>'))
    survey = replace(survey, mixing=None, entropy=None, repetition=None, semantics=None)
    first = survey.massive["without BOS"]
    odd = replace(first.peaks[0], token="<b>\n\x00$x$")
    survey = replace(survey, massive={"<i>$\\frac{": replace(first, peaks=(odd,))})
    survey = replace(survey, findings=(Finding("<u>", "a & b", "<s>"),), left_out={"<em>": "<q>"})
    for text in (page(survey), html_card(survey), atlas([survey])):
        reader = Reader(text)
        tags = Counter(tag for tag, _ in reader.tags)
        assert tags["script"] <= 1 and not tags.keys() & {"b\n", "i$", "u", "s", "em", "q"}
    assert "<script>alert" not in page(survey)
    assert "“<b>\\n\\x00$x$”" in shown(survey)


@pytest.mark.parametrize(
    ("raw", "told"), [("a\nb", "a\\nb"), ("<", "&lt;"), ("é本", "é本"), ('"', "&quot;"), ("\x00", "\\x00")]
)
def test_escape(raw: str, told: str):
    assert escape(raw) == told


# What it says


def test_the_verdict_and_the_three_signatures_stand_on_top():
    top = Reader(WHOLE.partition("<nav")[0]).text
    for words in ("smollm2-135m-instruct", "Sink-dependent: yes, 1.9 times", "Keep one sink and 255 recent tokens",
                  "Attention sinks 73.6 %", "Massive activations", "Value drain", "python-reference",
                  "2026-11-22"):  # fmt: skip
        assert words in top


def test_the_headline_follows_the_advice():
    assert "leans on its first token" in headline(fake_survey())
    free = replace(fake_advice(), dependent=False, ratio=1.01, sinks=0, window=256)
    assert "streams as well without sinks" in headline(fake_survey(advice=free))
    assert dependence(fake_survey(advice=free))[0] == "Sink-dependent: no, 1.01 times"
    four = replace(fake_advice(), sinks=4, ratio=2.31)
    assert "first four tokens: a stream that lets go of it has 2.3" in headline(fake_survey(advice=four))
    assert headline(bare_survey()) == "74 % of the heads give more than 0.3 of their attention to the first token."


def test_every_number_is_on_the_page():
    survey, text = fake_survey(), Reader(WHOLE).text
    rates = rates_of(survey)
    for one in rates.conditions:
        for share in (one.rate.value, one.rate.low, one.first_mass.value, one.first_four_mass.high, one.argmax.value):
            assert f"{100 * share:.1f}" in text
        assert all(f"{100 * mass:.1f} %" in text for mass in one.mass_by_layer)
        assert not one.is_natural or all(f"{100 * rate:.1f} %" in text for rate in one.heads.mean(axis=1))
    assert survey.interventions is not None and survey.semantics is not None and survey.mixing is not None
    for effect in survey.interventions.effects:
        assert effect.name in text and effect.group in text
        for of in (effect.perplexity, effect.loss, effect.ratio, effect.kl):
            assert f"{figures(of.value, 2 if of is effect.perplexity else 3)} (" in text
    for reading in survey.semantics.readings:
        assert f"{100 * reading.accuracy.value:.1f} %" in text and f"{100 * reading.retrieval.low:.1f}" in text
    for spread in survey.mixing.spreads:
        assert all(figures(value) in text for value in (spread.late.value, spread.middle.high, spread.overall[7]))
    assert survey.advice is not None
    for curve in (survey.advice.perplexity, survey.advice.by_capacity):
        assert all(f"{value:.2f}" in text for value in curve.values())
    for massive in survey.massive.values():
        assert all(f"{peak.ratio:,.0f} x" in text for peak in massive.peaks)
    assert all(f"{seconds:,.1f} s" in text for seconds in survey.seconds.values())


def test_words_that_were_given_are_on_the_page():
    survey, text = fake_survey(), Reader(WHOLE).text
    assert survey.interventions and survey.mixing and survey.semantics and survey.repetition and survey.entropy
    given = [rates_of(survey).verdict, survey.interventions.verdict, survey.mixing.verdict, survey.semantics.verdict,
             survey.repetition.verdict, *survey.left_out.values(), *DEFINITIONS.values()]  # fmt: skip
    given += [part for one in survey.findings for part in (one.title, one.text, one.rule)]
    given += [part for one in survey.entropy.folklore for part in (one.claim, one.rule)]
    given += ["sinks scan smollm2-135m-instruct --texts 100", "an imagined processor", "2.13.0", "PSF-2.0"]
    assert [words for words in given if words not in text] == []


def test_every_chart_says_what_to_see_and_to_those_who_cannot_see_it():
    reader = Reader(WHOLE)
    charts = [found for tag, found in reader.tags if tag == "svg" and found.get("class") == "plot"]
    assert len(charts) > 30
    assert all(found["role"] == "img" and len(found["aria-label"]) > 15 for found in charts)
    figures_found = re.findall(r"<figure id=\"([^\"]+)\".*?<figcaption><h3>(.*?)</h3><p>(.*?)</p>", WHOLE, re.S)
    assert len(figures_found) == WHOLE.count("<figure")
    for name, _, caption in figures_found:
        assert re.search(r"\d", caption), f"{name}: no number from the data in {caption!r}"


@pytest.mark.parametrize("seed", [1, 2])
def test_captions_follow_the_data(seed: int):
    captions = {name: words for name, words in re.findall(r"<figure id=\"([^\"]+)\".*?<p>(.*?)</p>", WHOLE, re.S)}
    other = page(fake_survey(seed=seed))
    changed = {name: words for name, words in re.findall(r"<figure id=\"([^\"]+)\".*?<p>(.*?)</p>", other, re.S)}
    assert captions.keys() == changed.keys()
    for name in ("sink-map", "massive-0", "kinds", "head-effects"):
        assert captions[name] != changed[name], name


def one_rate(by_layer: list[float]) -> SinkRate:
    one = rates_of(fake_survey(layers=len(by_layer), heads=2)).conditions[0]
    return replace(one, heads=np.array(by_layer)[:, None] * np.ones(2))


@pytest.mark.parametrize(
    ("by_layer", "words"),
    [
        ([0.7, 0.8, 0.9], "Every layer has heads with a sink."),
        ([0.0, 0.01, 0.02], "No layer has a sink."),
        ([0.9, 0.0, 0.0, 0.9], "A gap: layers 1, 2 have no sink, and those around them do."),
        ([0.0, 0.9, 0.0, 0.9], "Layers without a sink: 0, 2; 2 lie between layers that have them."),
        ([0.0, 0.3, 0.9], "Layers without a sink: 0."),
    ],
)
def test_a_gap_is_named(by_layer: list[float], words: str):
    assert bare_layers(one_rate(by_layer)) == words


def test_a_control_stands_under_its_edit():
    found = fake_interventions(4, 2, np.random.default_rng(0))
    rows = [(one.name, control) for one, control in ordered(found)]
    assert len(rows) == len(found.effects)
    at = rows.index(("zero the massive activations", False))
    assert rows[at + 1] == ("zero two random dimensions", True)
    assert rows[rows.index(("hide the sink", False)) + 1] == ("hide another key", True)
    text = Reader(WHOLE).text
    assert text.index("zero the massive activations 540,365") < text.index("control: zero two random dimensions 1.001")


# What is missing


@pytest.mark.parametrize("part", PARTS)
def test_a_page_is_whole_with_one_part_alone(part: str):
    absent: dict[str, None] = dict.fromkeys(PARTS)
    survey = bare_survey(**absent | {part: getattr(SMALL, part)}, left_out={"massive": "for a reason"})
    reader = Reader(page(survey))
    assert reader.open == [] and "for a reason" in reader.text
    assert not re.search(r"\bnan\b", reader.text)
    assert len([found for tag, found in reader.tags if tag == "figure"]) > 0


def test_a_model_that_writes_no_text_has_a_page():
    text = shown(bare_survey())
    assert "Sink-dependent: not measured" in text
    assert text.count("this kind of model writes no text") >= 7
    nothing = bare_survey(sink_rates=None)
    assert "not measured" in shown(nothing) and signatures(nothing)[0].course is None
    assert "What was measured" in headline(nothing)
    assert Reader(html_card(nothing)).open == []


def test_numbers_that_are_missing_do_no_harm():
    survey = fake_survey()
    rates = rates_of(survey)
    alone = replace(about(0.5), low=math.nan, high=math.nan, texts=1)
    unknown = replace(about(0.5), value=math.nan, low=math.nan, high=math.nan, texts=0)
    conditions = tuple(replace(one, rate=alone, first_mass=unknown, curve={}) for one in rates.conditions)
    absent = np.full((30, 3), np.nan)
    massive = {name: replace(one, value_ratio=absent, key_ratio=absent, peaks=(), lives=())
               for name, one in survey.massive.items()}  # fmt: skip
    effects = fake_interventions(30, 9, np.random.default_rng(0))
    assert effects.heads is not None
    untried = replace(
        effects.heads, **{name: np.full((30, 9), np.nan) for name in ("removed", "control", "low", "high")}
    )
    survey = replace(survey, sink_rates=replace(rates, conditions=conditions, lengths=()), massive=massive,
                     interventions=replace(effects, heads=untried))  # fmt: skip
    reader = Reader(page(survey))
    assert reader.open == [] and "No head was tried." in reader.text
    assert not re.search(r"\bnan\b", reader.text)


# How large


def test_a_page_is_small():
    assert len(WHOLE.encode()) < 2 * 2**20
    assert len(html_card(fake_survey()).encode()) < 100_000


def test_a_page_of_the_largest_model_is_small_too():
    text = page(fake_survey(layers=126, heads=128))
    assert len(text.encode()) < 6 * 2**20
    assert "layer 100: mean" in text, "where cells are too many, a layer tells its mean and most"


def test_every_cell_of_a_small_map_tells_its_value():
    one = rates_of(fake_survey()).conditions[0]
    found = re.search(r"<figure id=\"sink-map\".*?</figure>", WHOLE, re.S)
    assert found is not None
    for layer, head in np.ndindex(30, 9):
        value = one.importance[layer, head, 0]
        assert f'x="{layer}" y="{head}"' in found[0]
        assert f"<title>layer {layer}, head {head}: {value:.3f}</title>" in found[0]


# The atlas


def test_the_atlas_has_a_row_and_a_link_a_model():
    surveys = [fake_survey(), bare_survey(), fake_survey(about=fake_about("Org/Model 2"))]
    reader = Reader(atlas(surveys))
    links = [to for to in reader.values("href") if not to.startswith("#")]
    assert Counter(links) == {"smollm2-135m-instruct.html": 2, "dinov2-small.html": 2, "org-model-2.html": 2}
    assert page_name(surveys[2]) == "org-model-2.html"
    assert "yes, 1.85 ×" in reader.text and "2 of 2 models" in reader.text
    assert Reader(atlas(surveys, ["a/", "b/", "c/"])).values("href").count("b/") == 2


def test_the_atlas_is_the_same_from_saved_surveys():
    surveys = [fake_survey(), bare_survey()]
    assert atlas([to_plain(one) for one in surveys]) == atlas(surveys)
