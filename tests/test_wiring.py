"""dvc.yaml, params.yaml, the registries and the code say the same thing."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import yaml

from models import registry
from pipeline import params
from pipeline.__main__ import STAGES
from pipeline.simulate import EQUATIONS
from tests.imports import ROOT, closure

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PROJECT = yaml.safe_load((ROOT / "dvc.yaml").read_text())
PIPELINE = PROJECT["stages"]


def resolved() -> dict[str, dict]:
    """dvc.yaml with its matrices and loops written out: stage name -> {cmd, params, deps, outs}."""
    out = {}
    for name, stage in PIPELINE.items():
        if "foreach" in stage:
            table = PARAMS[stage["foreach"].strip("${}")]
            for key, item in table.items() if isinstance(table, dict) else zip(table, table, strict=True):
                names = (
                    {"key": key, "item": item} if not isinstance(item, dict) else {"key": key, **{f"item.{k}": v for k, v in item.items()}}
                )
                out[f"{name}@{key}"] = substitute(stage["do"], names)
        elif "matrix" in stage:
            combinations = [{}]
            for axis, reference in stage["matrix"].items():
                combinations = [{**c, f"item.{axis}": v} for c in combinations for v in PARAMS[reference.strip("${}")]]
            for names in combinations:
                out[f"{name}@{'-'.join(names.values())}"] = substitute({k: v for k, v in stage.items() if k != "matrix"}, names)
    return out


def substitute(node, names):
    if isinstance(node, str):
        return re.sub(r"\$\{([^}]+)\}", lambda m: str(names[m[1]]), node)
    if isinstance(node, list):
        return [substitute(item, names) for item in node]
    if isinstance(node, dict):
        return {substitute(k, names): substitute(v, names) for k, v in node.items()}
    return node


RESOLVED = resolved()


def commands(stage: dict) -> list[list[str]]:
    cmd = stage["cmd"] if isinstance(stage["cmd"], list) else [stage["cmd"]]
    return [shlex.split(line) for line in cmd]


def outputs(stage: dict) -> list[str]:
    written = [*stage["outs"], *stage.get("metrics", []), *stage.get("plots", [])]
    return [next(iter(out)) if isinstance(out, dict) else out for out in written]


def code_of(stage: dict) -> list[str]:
    return [dep for dep in stage["deps"] if dep.startswith(("pipeline", "models"))]


def closure_of(stage: dict) -> set[Path]:
    """What the stage can import: from its entry points, and from what it loads by import string (sources, equations, models)."""
    equations = {f"{module.replace('.', '/')}.py" for module in EQUATIONS.values()} if commands(stage)[0][3] == "simulate" else set()
    registered = [Path(dep) for dep in code_of(stage) if dep in equations or re.match(r"pipeline/sources/|models/\w+\.py", dep)]
    folders = [ROOT / dep for dep in code_of(stage) if (ROOT / dep).is_dir()]
    registered += [path.relative_to(ROOT) for folder in folders for path in sorted(folder.rglob("*.py"))]
    stages = [Path(str(import_module(f"pipeline.{words[3]}").__file__)).relative_to(ROOT) for words in commands(stage)]
    return closure(Path("pipeline/__main__.py"), *stages, *registered)


@pytest.mark.parametrize("name", RESOLVED)
def test_a_stage_runs_what_its_name_says_with_paths_it_declares(name: str) -> None:
    stage = RESOLVED[name]
    for words in commands(stage):
        assert words[:3] == ["python", "-m", "pipeline"]
        assert words[3] in STAGES
        keys = words[4 : words.index(next(w for w in words if w.startswith("--")))]
        assert params.name_of(import_module(f"pipeline.{words[3]}"), keys) in stage["params"], "the section the stage reads is a dependency"
        paths = dict(zip(words[4 + len(keys) :: 2], words[5 + len(keys) :: 2], strict=True))
        arguments = signature(import_module(f"pipeline.{words[3]}").run).parameters
        keywords = {n for n, p in arguments.items() if p.kind is p.KEYWORD_ONLY}
        assert {flag.removeprefix("--") for flag in paths} == keywords, "every path argument is given"
        for flag, path in paths.items():
            declared = outputs(stage) if flag == "--out" else [*stage["deps"], *outputs(stage)]
            assert any(path == one or one.startswith(f"{path}/") for one in declared), f"{path} is not declared"


@pytest.mark.parametrize("name", RESOLVED)
def test_the_section_of_a_stage_is_valid_under_every_preset_it_has(name: str, tmp_path: Path) -> None:
    for words in commands(RESOLVED[name]):
        keys = [word for word in words[4:] if not word.startswith("--") and "/" not in word]
        check(words[3], keys, tmp_path)


@pytest.mark.parametrize("word", PIPELINE)
def test_a_stage_with_presets_anywhere_depends_on_the_word_that_chooses(word: str) -> None:
    stage = PIPELINE[word].get("do", PIPELINE[word])
    chosen = "presets" in yaml.safe_dump(PARAMS.get(word, {}))
    assert not chosen or "preset" in stage["params"]


@pytest.mark.parametrize("name", sorted(f"{stage}.{key}" for stage in PIPELINE for key in PARAMS.get(stage, {}) if stage != "train"))
def test_sections_of_data_that_no_stage_names_are_valid_too(name: str, tmp_path: Path) -> None:
    stage, key = name.split(".")
    check(stage, [key, "any"] if stage in ("evaluate", "forecast") else [key], tmp_path)


@pytest.mark.parametrize("name", sorted(f"{dataset}.{model}" for dataset, models in PARAMS["train"].items() for model in models))
def test_every_pair_of_dataset_and_model_can_be_chosen(name: str, tmp_path: Path) -> None:
    check("train", name.split("."), tmp_path)


def test_the_default_datasets_know_every_model() -> None:
    for dataset in PARAMS["datasets"]:
        assert set(PARAMS["train"][dataset]) == set(registry.FIELD_MODELS)


def check(word: str, keys: list[str], folder: Path) -> None:
    """The section is valid under every preset that it has."""
    stage = import_module(f"pipeline.{word}")
    dotted = params.name_of(stage, keys)
    raw = PARAMS
    for key in dotted.split("."):
        raw = raw[key]
    alone = raw
    for key in reversed(dotted.split(".")):
        alone = {key: alone}
    for preset in ("quick", *raw.get("presets", {})):
        (folder / "params.yaml").write_text(yaml.safe_dump({**alone, "preset": preset}))
        assert params.load(folder / "params.yaml", dotted, stage.params_model(*keys)).budget == (preset, preset)


@pytest.mark.parametrize("name", RESOLVED)
def test_the_import_closure_of_a_stage_is_covered_by_its_deps(name: str) -> None:
    stage = RESOLVED[name]
    code = code_of(stage)
    needed = closure_of(stage)
    missing = sorted(str(path) for path in needed if not any(str(path) == dep or str(path).startswith(f"{dep}/") for dep in code))
    assert not missing, f"add to deps of {name.partition('@')[0]} in dvc.yaml: {', '.join(missing)}"
    assert all((ROOT / dep).exists() for dep in code)


@pytest.mark.parametrize("word", PIPELINE)
def test_a_stage_depends_on_no_code_it_cannot_import(word: str) -> None:
    needed: set[Path] = set()
    declared: set[str] = set()
    for name, stage in RESOLVED.items():
        if name.partition("@")[0] == word:
            needed |= closure_of(stage)
            declared |= set(code_of(stage))
    extra = [dep for dep in sorted(declared) if not any(str(path) == dep or str(path).startswith(f"{dep}/") for path in needed)]
    assert not extra, f"deps of {word} that nothing imports: {extra}"


def test_the_scores_of_every_model_are_metrics_and_the_reports_hold_plots() -> None:
    for name, stage in RESOLVED.items():
        word, _, pair = name.partition("@")
        if word in ("baselines", "evaluate"):
            dataset, _, model = pair.partition("-")
            assert stage["metrics"] == [f"data/scores/{dataset}/{model or 'baselines'}/metrics.json"]
    assert all(len(stage["plots"]) == 2 for name, stage in RESOLVED.items() if name.startswith("report@"))
    templates = {how["template"] for stage in RESOLVED.values() for plot in stage.get("plots", []) for how in plot.values()}
    assert all((ROOT / ".dvc" / "plots" / f"{template}.json").is_file() for template in templates)
    assert set(PROJECT["metrics"]) == {f"data/checked/{source}/report.json" for source in PARAMS["validated"]}


def test_every_dataset_has_its_sections_and_its_source() -> None:
    for dataset in PARAMS["datasets"]:
        assert PARAMS["source_of"][dataset] == PARAMS["subsample"][dataset]["source"]
        assert PARAMS["source_of"][dataset] in {**PARAMS["ingest"], **PARAMS["simulate"]}
        assert set(PARAMS["models"]) <= set(PARAMS["train"][dataset])
    assert set(PARAMS["source_of"]) == set(PARAMS["datasets"])
    assert PARAMS["ingested"] == {key: PARAMS["ingest"][key]["source"] for key in PARAMS["ingested"]}
    assert PARAMS["simulated"] == {key: EQUATIONS[PARAMS["simulate"][key]["equation"]].rpartition(".")[2] for key in PARAMS["simulated"]}


@pytest.mark.parametrize("name", [*registry.FIELD_MODELS, *registry.BASELINES])
def test_registered_predictors_load(name: str) -> None:
    predictor = registry.load(name)
    assert predictor.Config.model_config.get("frozen")
    assert predictor.Config.model_config.get("extra") == "forbid"


def test_an_unknown_key_is_an_error_with_its_dotted_name(tmp_path: Path) -> None:
    class Windows(params.Section):
        batch: int

    class Train(params.Section):
        windows: Windows

    with pytest.raises(params.ParamsError, match=r"train\.ns\.windows\.batsch: unknown key"):
        params.validated({"windows": {"batch": 1, "batsch": 2}}, Train, "train.ns")
    file = tmp_path / "params.yaml"
    file.write_text("train: {ns: {}}")
    with pytest.raises(params.ParamsError, match=r"train holds ns, not 'nz'"):
        params.read(file, "train.nz")


def test_a_preset_lies_over_its_section_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    section = (
        "train: { ns: { model: { width: 8, heads: 2 }, steps: 10, presets: { paper: { model: { width: 64 } } } }, other: { steps: 3 } }\n"
    )

    def read(word: str, dotted: str = "train.ns") -> object:
        file.write_text(f"preset: {word}\n{section}")
        return params.read(file, dotted)[0]

    assert read("quick") == {"model": {"width": 8, "heads": 2}, "steps": 10}
    assert read("paper") == {"model": {"width": 64, "heads": 2}, "steps": 10}
    assert read("paper", "train.other") == {"steps": 3}
    with pytest.raises(params.ParamsError, match="unknown preset papier: expected one of quick, standard, paper"):
        read("papier")


def test_a_section_without_the_chosen_preset_takes_the_next_smaller_one_and_knows(tmp_path: Path) -> None:
    class Train(params.Section):
        steps: int

    file = tmp_path / "params.yaml"

    def load(word: str, presets: str) -> tuple[int, str]:
        file.write_text(f"preset: {word}\ntrain: {{ steps: 1, presets: {presets} }}")
        section = params.load(file, "train", Train)
        return section.steps, str(section.budget)

    assert load("paper", "{ standard: { steps: 2 }, paper: { steps: 3 } }") == (3, "paper")
    assert load("paper", "{ standard: { steps: 2 } }") == (2, "standard (no `paper` preset)")
    assert load("standard", "{ paper: { steps: 3 } }") == (1, "quick (no `standard` preset)")
    assert load("quick", "{}") == (1, "quick")
