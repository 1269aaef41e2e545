"""Every method of the paper's family trains through the real engine, on any number of ranks."""

import pytest
import yaml
from builders import TEACHER, SmallWorld, metrics_of
from ranks import run_function
from trainings import train_runs

from srepa_ds.cli import run

POINTWISE = {"weight": 1.0}
MSE = {"kind": "mse", "weight": 2.0}
IREPA = {"projector": {"kind": "conv", "kernel": 3}, "spatial_norm": {"gamma": 0.6}}
STEPS, OVER = 6, 3
# Rows: what an alignment of the small experiment says instead, and the model's class token.
METHODS = {
    "irepa": ([{**IREPA, "pointwise": POINTWISE}], None),
    "irepa_srepa": ([{**IREPA, "pointwise": POINTWISE, "structural": MSE}], None),
    "reg": ([{"pointwise": {"weight": 0.5, "include_cls": True}}], 32),
    "reg_srepa": (
        [
            {
                "pointwise": {"weight": 0.5, "include_cls": True},
                "structural": {"kind": "kl", "weight": 0.5, "include_cls": True},
            }
        ],
        32,
    ),
    "hidden": ([{"structural": {**MSE, "tokens": "hidden"}}], None),
    "stopped": (
        [
            {
                "pointwise": {**POINTWISE, "schedule": {"kind": "stop", "end_step": OVER}},
                "structural": {**MSE, "schedule": {"kind": "cosine", "end_step": OVER}},
            }
        ],
        None,
    ),
    "reg_stopped": (
        [
            {
                "pointwise": {
                    "weight": 0.5,
                    "include_cls": True,
                    "schedule": {"kind": "stop", "end_step": OVER},
                }
            }
        ],
        32,
    ),
    "two_teachers": (
        [
            {"pointwise": POINTWISE},
            {
                **IREPA,
                "depth": 3,
                "structural": MSE,
                "input_size": 12,
                "resampling": {"direction": "teacher_to_student", "mode": "bicubic"},
            },
        ],
        None,
    ),
    "to_a_finer_teacher": (
        [
            {
                "pointwise": POINTWISE,
                "structural": MSE,
                "input_size": 24,
                "resampling": {"direction": "student_to_teacher", "mode": "bilinear"},
            }
        ],
        None,
    ),
}
ARRANGEMENTS = {"one rank": (1, 0), "ZeRO-2": (2, 2), "ZeRO-3": (2, 3)}


def experiment(world: SmallWorld, method: str) -> dict:
    """The small experiment, training by `method`."""
    tree = yaml.safe_load(world.config.read_text())
    rows, class_token_width = METHODS[method]
    alignments = []
    for row in rows:
        row = {"depth": 2, "projector": {"hidden_width": 64}, **row}
        spec = {**TEACHER, "input_size": row.pop("input_size", 16)}
        teacher = {**tree["alignments"][0]["teacher"], "spec": spec}
        alignments.append({"teacher": teacher, **row})
    model = {**tree["model"], "class_token_width": class_token_width}
    return {**tree, "model": model, "alignments": alignments}


@pytest.fixture(scope="module")
def records(small_world, tmp_path_factory) -> dict[tuple[str, str], list[dict]]:
    """The record of a short run of every method in every arrangement."""
    root = tmp_path_factory.mktemp("methods")
    found = {}
    for arrangement, (world_size, stage) in ARRANGEMENTS.items():
        folder = root / arrangement.replace(" ", "-")
        folder.mkdir()
        paths = []
        for method in METHODS:
            tree = experiment(small_world, method)
            tree["run"] = {"folder": str(folder / method)}
            tree["train"] = {"steps": STEPS, "batch_size": 16, "log_every_steps": 1}
            tree["engine"] = {"precision": "fp32", "deepspeed": f"ds_configs/zero{stage}.json"}
            paths.append(folder / f"{method}.yaml")
            paths[-1].write_text(yaml.safe_dump(tree))
        run_function(train_runs, world_size, *([path] for path in paths))
        for method in METHODS:
            found[arrangement, method] = metrics_of(folder / method)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_same_run_on_any_number_of_ranks(records, method):
    one = records["one rank", method]
    assert len(one) == STEPS
    for arrangement in ("ZeRO-2", "ZeRO-3"):
        other = records[arrangement, method]
        for key in ("loss_total", "loss_flow", "loss_pointwise", "loss_structural", "loss_cls"):
            values = [[line[key] for line in lines] for lines in (one, other)]
            assert values[0] == pytest.approx(values[1], rel=2e-4, abs=1e-6), (arrangement, key)
        assert all(line["skipped"] == 0 for line in other)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_terms_it_is_made_of(records, method):
    lines = records["ZeRO-2", method]
    rows, class_token_width = METHODS[method]
    terms = {name for row in rows for name in row}
    running = lines[:OVER]
    assert all((line["loss_pointwise"] != 0) == ("pointwise" in terms) for line in running)
    assert all((line["loss_structural"] > 0) == ("structural" in terms) for line in running)
    assert all((line["loss_cls"] > 0) == (class_token_width is not None) for line in lines)
    if "stopped" in method:
        assert all(line["loss_pointwise"] == line["loss_structural"] == 0 for line in lines[OVER:])
        assert all(line["gradient_norm"] > 0 for line in lines)


@pytest.mark.slow
def test_stored_tokens_train_the_same_model(small_world, tmp_path):
    """The teacher's own tokens, then bf16 and int8 ones read from disk: nearly the same losses."""
    world = small_world.copied_to(tmp_path / "world").folder
    tree = yaml.safe_load((world / "experiment.yaml").read_text())
    tree["train"]["steps"] = 8
    found = {}
    for storage in (None, "bf16", "int8"):
        path = world / f"{storage}.yaml"
        alignments = [{**tree["alignments"][0], "stored_tokens": storage}]
        run_folder = {"folder": str(world / f"run-{storage}")}
        path.write_text(yaml.safe_dump({**tree, "run": run_folder, "alignments": alignments}))
        if storage:
            assert run(["prepare", str(path), "--teacher"]) == 0
        run_function(train_runs, 2, [path])
        found[storage] = [line["loss_total"] for line in metrics_of(world / f"run-{storage}")]
    assert found["bf16"] == pytest.approx(found[None], rel=1e-3)
    assert found["int8"] == pytest.approx(found[None], rel=1e-2)
    assert found["bf16"] != found[None]
