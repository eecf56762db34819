# ruff: noqa: E501  (sentences are tested whole)
"""Suites: what they expand to, and what a wrong one says."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dashbench.suite import SUITE_KINDS, SuiteError, json_schema, load_suite

ROOT = Path(__file__).parent.parent
SUITES = sorted((ROOT / "suites").glob("*.yaml"))
BASE = {
    "version": 1, "kind": "kernels", "name": "s", "methods": ["dense@math", "dash@reference"], "phase": "prefill",
    "context": [1024, "2k"], "shape": "tiny", "sparsity": [{"S_flop": 0.5}, {"S_flop": 0.75}],
}  # fmt: skip


def write(folder, content):
    path = folder / "s.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def points(folder, **changes):
    return load_suite(write(folder, {**BASE, **changes})).points()


def brief(found):
    return [(p.method, p.context, p.sparsity_target) for p in found]


def test_product_with_methods_innermost_and_dense_methods_once(tmp_path):
    found = brief(points(tmp_path))
    assert found == [
        ("dense@math", 1024, None), ("dash@reference", 1024, 0.5), ("dash@reference", 1024, 0.75),
        ("dense@math", 2048, None), ("dash@reference", 2048, 0.5), ("dash@reference", 2048, 0.75),
    ]  # fmt: skip


def test_zipped_targets_advance_with_their_axis(tmp_path):
    assert brief(points(tmp_path, zip=[["context", "sparsity"]])) == [
        ("dense@math", 1024, None), ("dash@reference", 1024, 0.5),
        ("dense@math", 2048, None), ("dash@reference", 2048, 0.75),
    ]  # fmt: skip


def test_exclude_compares_sparsity_as_a_fraction(tmp_path):
    less = points(tmp_path, context=1024, exclude=[{"sparsity": ">0.6"}])
    assert brief(less) == [("dense@math", 1024, None), ("dash@reference", 1024, 0.5)]


def test_order_of_nested_keys_does_not_change_the_points(tmp_path):
    def built(order):
        knobs = {"scaling_factor": [1.0, 2.0], "alpha": [1.5, 2.0]}
        excluded = {"context": 2048, "phase": "prefill"}
        return load_suite(
            write(
                tmp_path,
                {
                    **BASE,
                    "methods": [{"name": "dash@reference", "knobs": dict(order(knobs.items()))}],
                    "exclude": [dict(order(excluded.items()))],
                },
            )
        )

    first, second = built(list), built(reversed)
    assert len(first.points()) == 4
    assert [p.key() for p in first.points()] == [p.key() for p in second.points()]


def test_knobs_span_axes_and_replace_targets(tmp_path):
    found = points(
        tmp_path, methods=[{"name": "dash@reference", "knobs": {"scaling_factor": [1.0, 2.0], "alpha": 1.5}}]
    )
    assert [(p.context, p.knobs) for p in found[:2]] == [
        (1024, {"scaling_factor": 1.0, "alpha": 1.5}),
        (1024, {"scaling_factor": 2.0, "alpha": 1.5}),
    ]
    assert all(p.sparsity_target is None for p in found)


def test_an_included_grid_has_zips_of_its_own(tmp_path):
    extra = {"batch": [2, 4], "seed": [5, 6], "zip": [["batch", "seed"]]}
    found = points(tmp_path, methods="dense@math", context=1024, include=[extra])
    assert [(p.batch, p.seed) for p in found] == [(1, 0), (2, 5), (4, 6)]


def test_zip_include_and_exclude(tmp_path):
    zipped = points(tmp_path, methods="dense@math", batch=[1, 8], zip=[["context", "batch"]])
    assert [(p.context, p.batch) for p in zipped] == [(1024, 1), (2048, 8)]
    more = points(tmp_path, methods="dense@math", include=[{"context": 4096, "phase": ["decode", "prefill"]}])
    assert [(p.phase, p.context) for p in more] == [
        ("prefill", 1024), ("prefill", 2048), ("decode", 4096), ("prefill", 4096),
    ]  # fmt: skip
    same = points(tmp_path, methods="dense@math", include=[{"context": 1024}])
    assert len(same) == 2, "a point that is there already is not doubled"
    less = points(tmp_path, exclude=[{"context": ">1k", "method": "dash@reference"}, {"sparsity": 0.75}])
    assert brief(less) == [
        ("dense@math", 1024, None),
        ("dash@reference", 1024, 0.5),
        ("dense@math", 2048, None),
    ]


@settings(max_examples=25, deadline=None)
@given(st.permutations(list(BASE)))
def test_order_of_keys_does_not_matter(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("s")
    first, second = load_suite(write(folder, BASE)), load_suite(write(folder, {k: BASE[k] for k in order}))
    assert first.id == second.id
    assert [p.key() for p in first.points()] == [p.key() for p in second.points()]


GOOD = """version: 1
kind: kernels
name: s
methods: [dense@math]
phase: prefill
context: [1k]
shape: tiny
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "contxt: 3\n", "{f}:8: contxt: unknown key; did you mean 'context'?"),
        (GOOD + "timing:\n  min_sample: 3\n", "{f}:9: timing.min_sample: unknown key; did you mean 'min_samples'?"),
        (GOOD.replace("prefill", "prefil"), "{f}:5: phase: expected one of prefill, decode, train, layer, got 'prefil'; did you mean 'prefill'?"),
        (GOOD.replace("dense@math", "dense@maths"), "{f}:4: methods.0: unknown method 'dense@maths'; did you mean 'dense@math'?"),
        (GOOD.replace("tiny", "minicpm-8b"), "{f}:7: shape: unknown shape 'minicpm-8b'; did you mean 'minicpm4-8b'?"),
        (GOOD + "routing: topic\n", "{f}:8: routing: unknown routing 'topic'; did you mean 'topics'?"),
        (GOOD + "routing: {name: topics, options: {segments: 3}}\n", "{f}:8: routing: routing topics has no option 'segments'; did you mean 'segment'?"),
        (GOOD.replace("[1k]", "[1k, many]"), "{f}:6: context.1: expected a whole number, such as 4096 or 4k, got 'many'"),
        (GOOD.replace("[1k]", "[0]"), "{f}:6: context.0: input should be greater than 0, got 0"),
        (GOOD + "sparsity: {S_flop: 1.5}\n", "{f}:8: sparsity.S_flop: input should be less than 1, got 1.5"),
        (GOOD.replace("version: 1\n", ""), "{f}:1: version: missing key"),
        (GOOD.replace("version: 1", "version: 2"), "{f}:1: version: expected one of 1, got 2"),
        (GOOD.replace("shape: tiny\n", ""), "{f}:1: shape: missing key"),
        (GOOD + "context: 3\n", "{f}:8: key 'context' is given twice"),
        (GOOD + "zip: [[context, batches]]\n", "{f}:8: zip.0.1: unknown axis 'batches'; did you mean 'batch'?"),
        (GOOD + "batch: [1, 8]\nzip: [[context, batch]]\n", "{f}:9: zip.0: axes of one group need equal lengths, got {{'context': 1, 'batch': 2}}"),
        (GOOD + "exclude: [{contex: 3}]\n", "{f}:8: exclude.0.contex: unknown key; did you mean 'context'?"),
        (GOOD + "exclude: [{context: 1k}]\n", "{f}: no points are left after `exclude`"),
        ("- 1\n", "{f}:1: a suite is a mapping of keys to values"),
        ("a: [1\n", "{f}:2: not YAML: expected ',' or ']', but got '<stream end>'"),
        (GOOD.replace("tiny", "{query_heads: 5, kv_heads: 2, head_dim: 64}"), "{f}:7: shape: query_heads 5 is not a multiple of kv_heads 2"),
        # What is typed in `exclude` has to be able to match: a typo there would bring costly points back.
        (GOOD + "exclude:\n  - {context: 2k}\n  - {method: dense@mathh}\n", "{f}:10: exclude.1.method: expected the name of a method, got 'dense@mathh'; did you mean 'dense@math'?"),
        (GOOD + "exclude: [{phase: prefil}]\n", "{f}:8: exclude.0.phase: expected the name of a phase, got 'prefil'; did you mean 'prefill'?"),
        (GOOD + "exclude: [{launch: '>3'}]\n", "{f}:8: exclude.0.launch: expected the name of a launch, got '>3'; known: eager, graph"),
        (GOOD + "exclude: [{context: '>64kk'}]\n", "{f}:8: exclude.0.context: expected a number, or a comparison such as '>16k', got '>64kk'"),
        (GOOD + "exclude: [{batch: yes}]\n", "{f}:8: exclude.0.batch: expected a number, or a comparison such as '>16k', got True"),
        (GOOD + "exclude: [{}]\n", "{f}:8: exclude.0: expected at least one key; an empty entry matches every point"),
        (GOOD + "include:\n  - zip: [[context, sed]]\n", "{f}:9: include.0.zip.0.1: unknown axis 'sed'; did you mean 'seed'?"),
        (GOOD.replace("kernels", "kernel"), "{f}:2: kind: expected one of {kinds}, got 'kernel'; did you mean 'kernels'?"),
        (GOOD + "zip:\n  - [context, batch]\n  - [batch, seed]\n", "{f}:10: zip.1.0: axis 'batch' is zipped twice"),
        (GOOD.replace("[1k]", "[]"), "{f}:6: context: expected at least one value, got []"),
        (GOOD.replace("[1k]", ""), "{f}:6: context: expected a value, got nothing"),
        (GOOD + "batch: true\n", "{f}:8: batch: expected a whole number, got True"),
        (GOOD.replace("[1k]", "1.5k"), "{f}:6: context: expected a whole number, such as 4096 or 4k, got '1.5k'"),
        (GOOD + "sparsity: 0.75\n", "{f}:8: sparsity: expected a mapping such as {{S_flop: 0.75}}, got 0.75"),
        (GOOD + "timing:\n  min_samples: 50\n  max_samples: 3\n", "{f}:8: timing: min_samples 50 is more than max_samples 3"),
        (GOOD + "timing: {max_seconds: .inf}\n", "{f}:8: timing.max_seconds: input should be a finite number, got inf"),
        (GOOD.replace("tiny", "{query_heads: 4, kv_head: 1, head_dim: 64}"), "{f}:7: shape.kv_heads: missing key (and 1 more problem)"),
        (GOOD.replace("tiny", "{query_heads: 4, kv_heads: 1, head_dim: 64, heads: 3}"), "{f}:7: shape.heads: unknown key; did you mean 'kv_heads'?"),
        (GOOD + "include:\n  - contxt: 4k\n", "{f}:9: include.0.contxt: unknown key; did you mean 'context'?"),
        (GOOD + "include:\n  - context:\n", "{f}:9: include.0.context: expected a value, got nothing"),
        (GOOD.replace("[dense@math]", "[{name: dense@math, python: a}, {name: dense@math, python: b}]"), "{f}:4: methods.1: dense@math has another `python` elsewhere in this suite"),
        (GOOD.replace("[dense@math]", "[{name: dash@reference, knobs: {scaling_factor: []}}]"), "{f}:4: methods.0.knobs.scaling_factor: expected at least one value, got []"),
        (GOOD + "? [a, b]\n: 3\n", "{f}:8: a key is a word, not a list or a mapping"),
        (GOOD + "3: 3\n", "{f}:8: key 3 is not a word; quote it if it is one"),
        (GOOD + "x: &a [*a]\n", "{f}:8: an alias contains itself"),
    ],
)  # fmt: skip
def test_a_wrong_suite_says_where_and_what_instead(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(SuiteError) as problem:
        load_suite(path)
    assert str(problem.value) == message.format(f=path, kinds=", ".join(SUITE_KINDS))


def test_a_missing_suite_names_its_neighbour():
    with pytest.raises(
        SuiteError, match=r"quickstat\.yaml: no such suite; did you mean 'quickstart\.yaml'\?"
    ):
        load_suite(ROOT / "suites" / "quickstat.yaml")


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_committed_suites_are_valid_named_after_their_file_and_commented(path):
    suite = load_suite(path)
    assert suite.spec.name == path.stem and suite.points()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        code = line.split("#")[0].strip()
        above = path.read_text().splitlines()[number - 2].strip()
        if code:
            assert "#" in line or above.startswith(("#", "- {")), f"{path.name}:{number} has no comment"


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_the_schema_accepts_what_the_loader_accepts(path):
    """Editors judge by the schema: scalars for lists, `16k`, and names for mappings are all fine."""
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())


@pytest.mark.parametrize(
    "change",
    [
        {"contxt": 3}, {"phase": "prefil"}, {"context": "many"}, {"context": [0]}, {"shape": "minicpm-8b"},
        {"routing": "topic"}, {"exclude": [{"contex": 3}]}, {"zip": [["context", "batches"]]}, {"sparsity": 0.75},
        {"shape": {"query_heads": 4, "kv_heads": 1}}, {"timing": {"min_sample": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_the_schema_refuses_what_the_loader_refuses(tmp_path, change):
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(SuiteError):
        load_suite(write(tmp_path, {**BASE, **change}))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**BASE, **change}, json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({k: v for k, v in BASE.items() if k != "shape"}, json_schema())


def test_the_exported_schema_is_current():
    assert json.loads((ROOT / "suites" / "suite.schema.json").read_text()) == json_schema()
