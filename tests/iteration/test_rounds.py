"""Re-estimation and rounds against their meaning: checkpoints that are written, calibrated and planned one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moekern import kernels
from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.calibration.sharing import recipe_of
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli import console
from moekern.cli.app import app, main
from moekern.criteria import criterion_named, score_layer
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.iteration.rounds import Method, iterate, schedule
from moekern.measurement.weights import weigh
from moekern.model.compute import Compute
from moekern.plan.choose import choose_top
from moekern.plan.document import NONUNIFORM, LayerPlan, Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.make import make_plan
from moekern.pruning.prune import prune
from moekern.statistics.file import Statistics
from tests.helpers import families
from tests.helpers.pairwise import thirds

MakeCheckpoint = Callable[[str], Path]
Keeps = dict[str, tuple[int, ...]]
# Stacked and indexed experts, selection biases with groups, rows of the router that stay, state between layers.
FAMILIES = ("qwen3_moe", "deepseek_v3", "longcat_flash")
# What plans of rounds say beside what every plan says.
OWN = ("config", "data", "dtype", "backend", "rounds", "reestimate", "earlier_rounds")
CHECKED = [name for name in families.FAMILIES if name not in families.NO_CALIBRATION]


def data_of(name: str) -> TokenData:
    batches = [Batch(domain, families.input_ids(name, 2, 12, seed)) for seed, domain in enumerate("aba")]
    return TokenData(tuple(batches), {"seeds": 3})


def written(source: Path, keeps: Mapping[str, tuple[int, ...]], out: Path) -> Path:
    """The checkpoint pruned to `keeps`; layers that are not named stay whole."""
    layers = find_layout(open_checkpoint(source)).layers
    whole = {key: LayerPlan(keeps.get(key, tuple(range(layer.num_experts)))) for key, layer in layers.items()}
    prune(source, Plan(whole, {NONUNIFORM: True}), out)
    return out


def slow_round(
    source: Path,
    data: TokenData,
    criterion: str,
    counts: Mapping[str, int],
    held: Keeps,
    *,
    reestimate: bool,
    work: Path,
) -> dict[str, LayerPlan]:
    """One round by whole checkpoints: calibrate what is left so far, plan one layer, write, and so on.

    The scores are those of the experts the layer has left.
    """
    now: Keeps = dict(held)
    chosen: dict[str, LayerPlan] = {}
    for key, count in counts.items():
        seen = written(source, now if reestimate else held, work / f"before-{key}")
        statistics = calibrate(seen, data, Compute(dtype=torch.float32), tiers=criterion_named(criterion).tiers)
        experts = statistics.layer(key).num_experts
        only = Statistics({**statistics.header, "num_experts": experts}, {key: statistics.layers[key]})
        ids = held.get(key, tuple(range(experts)))
        found = make_plan(only, criterion, count).layers[key]
        chosen[key] = LayerPlan(tuple(ids[e] for e in found.keep), found.scores)
        now[key] = chosen[key].keep
    return chosen


def keeps_of(plan: Plan) -> Keeps:
    return {key: layer.keep for key, layer in plan.layers.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_re_estimation_is_a_loop_over_written_checkpoints(
    name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, data = family_checkpoint(name), data_of(name)
    plan = iterate(source, data, Method("reap", 4), Compute(dtype=torch.float32))
    layout = find_layout(open_checkpoint(source))
    check_plan(plan, layout, open_checkpoint(source).fingerprint)
    want = slow_round(source, data, "reap", dict.fromkeys(layout.layers, 4), {}, reestimate=True, work=tmp_path)
    assert dict(plan.layers) == want  # scores too, bit for bit
    one_shot = keeps_of(make_plan(calibrate(source, data, Compute(dtype=torch.float32)), "reap", 4))
    assert keeps_of(plan) != one_shot, "nothing was re-estimated"


@pytest.mark.parametrize("reestimate", [True, False])
def test_rounds_are_a_loop_over_written_checkpoints(
    reestimate: bool, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, data = family_checkpoint("qwen3_moe"), data_of("qwen3_moe")
    method = Method("gated_norm", 0.5, rounds=2, reestimate=reestimate)
    rounds: list[Plan] = []
    plan = iterate(source, data, method, Compute(dtype=torch.float32), finished=rounds.append)
    held: Keeps = {}
    for number, count in enumerate((6, 4)):
        (tmp_path / str(number)).mkdir()
        counts = dict.fromkeys(plan.layers, count)
        found = slow_round(source, data, "gated_norm", counts, held, reestimate=reestimate, work=tmp_path / str(number))
        held = {key: layer.keep for key, layer in found.items()}
        assert keeps_of([*rounds, plan][number]) == held
    assert plan.provenance["earlier_rounds"] == [{k: list(v) for k, v in keeps_of(rounds[0]).items()}]


@pytest.mark.parametrize("name", thirds(CHECKED, 0))
def test_running_a_layer_twice_changes_nothing(name: str, family_checkpoint: MakeCheckpoint) -> None:
    """With every expert kept, what the second run hands on must be what the first would have."""
    source, data = family_checkpoint(name), data_of(name)
    experts = find_layout(open_checkpoint(source)).num_experts
    plan = iterate(source, data, Method("gated_norm", experts), Compute(dtype=torch.float32))
    statistics = calibrate(source, data, Compute(dtype=torch.float32), tiers=())
    assert dict(plan.layers) == dict(make_plan(statistics, "gated_norm", experts).layers)


@pytest.mark.parametrize(
    "criterion", ["reap", "ean_dim", "evtc", "shape", "random", "worst_domain(reap)", "rank(eae, ets)"]
)
def test_one_round_without_re_estimation_is_calibrate_and_plan(
    criterion: str, family_checkpoint: MakeCheckpoint
) -> None:
    source, data = family_checkpoint("qwen3_moe"), data_of("qwen3_moe")
    method = Method(criterion, 0.5, reestimate=False, seed=3, domains=("a",))
    plan = iterate(source, data, method)
    one_shot = make_plan(
        calibrate(source, data, tiers=criterion_named(criterion).tiers), criterion, 0.5, seed=3, domains=["a"]
    )
    assert dict(plan.layers) == dict(one_shot.layers)
    assert plan.provenance == {**one_shot.provenance, **{key: plan.provenance[key] for key in OWN}}
    assert set(plan.provenance) - set(one_shot.provenance) == set(OWN)
    assert iterate(source, data, method).to_json() == plan.to_json()


def test_a_named_backend_weighs_or_is_refused(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, asked, weight_stats = family_checkpoint("mixtral"), set[str | None](), kernels.weight_stats

    def told(matrix: object, sums: object, *, backend: str | None = None) -> None:
        asked.add(backend)
        weight_stats(matrix, sums, backend=backend)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "weight_stats", told)
    iterate(source, None, Method("aimer", 2), Compute(backend="reference"))
    assert asked == {"reference"}
    with pytest.raises(InputError, match="--backend grouped_mm: "):
        iterate(source, None, Method("aimer", 2), Compute(backend="grouped_mm"))


@pytest.mark.parametrize("criterion", ["ews", "aimer"])
def test_rounds_on_weights_need_no_pass(criterion: str, family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = family_checkpoint("mixtral")
    plan = iterate(source, None, Method(criterion, 2, rounds=3))
    held: Keeps = {}
    for number, count in enumerate((6, 4, 2)):
        found = weigh(written(source, held, tmp_path / str(number)))
        left = {}
        for key in found.layers:
            sums = found.layer(key)
            scores = score_layer(criterion_named(criterion), sums, key).tolist()
            ids = held.get(key, tuple(range(8)))
            left[key] = tuple(ids[e] for e in choose_top(scores, count))
        held = left
    assert keeps_of(plan) == held
    one_shot = keeps_of(iterate(source, None, Method(criterion, 2)))
    assert (keeps_of(plan) == one_shot) == (criterion == "aimer")


@pytest.mark.parametrize("criterion", ["gated_norm", "aimer"])
def test_every_round_says_where_it_comes_from_as_other_plans_do(
    criterion: str, family_checkpoint: MakeCheckpoint
) -> None:
    source, data = family_checkpoint("mixtral"), None if criterion == "aimer" else data_of("mixtral")
    rounds: list[Plan] = []
    rounds.append(iterate(source, data, Method(criterion, 2, rounds=3), finished=rounds.append))
    other = make_plan(weigh(source) if data is None else calibrate(source, data), criterion, 2)
    for done, plan in enumerate(rounds):
        found = dict(plan.provenance)
        assert len(found.pop("earlier_rounds")) == done
        assert (found.pop("rounds"), found.pop("reestimate")) == (3, data is not None)
        recipe = None if data is None else recipe_of(data, Compute(dtype="float32"), ())
        assert (found.pop("data"), found.pop("dtype")) == (recipe, data and "float32")
        assert (found.pop("backend") is None) == (data is None)
        assert found.pop("config") == open_checkpoint(source).config_sha256
        assert found == {**other.provenance, "kept": (6, 4, 2)[done]}


def test_layers_of_different_sizes_say_so_on_the_way(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Rounds come to one count from different ones, and go on from there when they are read back."""
    first = next(iter(find_layout(open_checkpoint(family_checkpoint("mixtral"))).layers))
    source, method = (
        written(family_checkpoint("mixtral"), {first: tuple(range(6))}, tmp_path / "m"),
        Method("ews", 4, 2),
    )
    rounds: list[Plan] = []
    plan = iterate(source, None, method, finished=rounds.append)
    assert rounds[0].provenance["kept"] == {key: 5 if key == first else 6 for key in plan.layers}
    assert rounds[0].provenance[NONUNIFORM] is True
    assert plan.provenance["kept"] == 4
    assert NONUNIFORM not in plan.provenance
    made: list[Plan] = []
    read = [Plan.from_json(each.to_json()) for each in rounds]
    assert iterate(source, None, method, earlier=read, finished=made.append).to_json() == plan.to_json()
    assert not made


def test_a_stopped_run_goes_on_after_its_last_round(family_checkpoint: MakeCheckpoint) -> None:
    source, data = family_checkpoint("olmoe"), data_of("olmoe")
    method = Method("reap", 2, rounds=3)
    rounds: list[Plan] = []
    plan = iterate(source, data, method, finished=rounds.append)
    assert len(rounds) == 2
    for earlier in (rounds[:1], rounds):
        made: list[Plan] = []
        read = [Plan.from_json(each.to_json()) for each in earlier]
        assert iterate(source, data, method, earlier=read, finished=made.append).to_json() == plan.to_json()
        assert len(made) == 2 - len(earlier)
    made = []
    iterate(source, data, Method("reap", 2, rounds=3, seed=1), earlier=rounds, finished=made.append)
    assert len(made) == 2, "rounds of another run were taken over"
    model = open_checkpoint(source)
    other = replace(model, config={**model.config, "rms_norm_eps": 1e-3})
    iterate(other, data, method, earlier=rounds, finished=made.append)
    assert len(made) == 4, "rounds of another config were taken over"


def test_rounds_of_a_plug_in_that_was_changed_are_not_taken_over(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, data, code = family_checkpoint("olmoe"), data_of("olmoe"), tmp_path / "mine.py"
    for criterion in (f"{code}:score", f"rank(reap, {code}:score*2)"):
        code.write_text("def score(s):\n    return s.gate_sum\n")
        method, made = Method(criterion, 4, rounds=2), list[Plan]()
        iterate(source, data, method, finished=made.append)
        iterate(source, data, method, earlier=made[:1], finished=made.append)
        assert len(made) == 1
        code.write_text("def score(s):\n    return -s.gate_sum\n")
        iterate(source, data, method, earlier=made[:1], finished=made.append)
        assert len(made) == 2


def test_rounds_drop_as_many_each_time() -> None:
    assert schedule(8, 4, 4) == (7, 6, 5, 4)
    assert schedule(64, 32, 3, groups=8) == (56, 48, 32)
    assert schedule(8, 8, 1) == (8,)
    with pytest.raises(InputError, match=r"--rounds 5: expected 1 to 4"):
        schedule(8, 4, 5)
    with pytest.raises(InputError, match="--rounds 0"):
        schedule(8, 4, 0)


@pytest.fixture
def text(tmp_path: Path) -> str:
    rows = families.input_ids("qwen3_moe", 8, 20, 11).tolist()
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return f"d={tmp_path / 'ids.jsonl'}"


def test_the_command_writes_a_plan_that_prunes(family_checkpoint: MakeCheckpoint, text: str, tmp_path: Path) -> None:
    source, out = family_checkpoint("qwen3_moe"), tmp_path / "plan.json"
    command = ["iterate", str(source), "--data", text, "--keep", "0.5", "--rounds", "2", "--sequence-length", "20"]
    side = tmp_path / "plan.json.moekern"
    with console.output(False):
        result = CliRunner().invoke(app, [*command, "--out", str(out), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    plan = Plan.load(out)
    assert document["digest"] == plan.digest
    assert document["rounds"] == 2
    assert document["reestimate"] is True
    assert len(document["earlier_rounds"]) == 1
    assert not side.exists()
    prune(source, plan, tmp_path / "pruned")
    shown = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "again.json")], catch_exceptions=False)
    assert "gated_norm (tier routed), 4 of 8 experts" in shown.stdout
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_a_killed_command_goes_on(
    family_checkpoint: MakeCheckpoint, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = family_checkpoint("qwen3_moe"), tmp_path / "plan.json"
    command = ["iterate", str(source), "--data", text, "--keep", "2", "--rounds", "3", "--out", str(out)]
    CliRunner().invoke(app, command, catch_exceptions=False)
    whole = out.read_bytes()
    out.unlink()
    passes: list[int] = []
    from moekern.iteration import rounds as iteration

    def counted(job, data, how, keeps, *more):
        passes.append(len(keeps))
        if len(passes) == 2:
            raise KeyboardInterrupt
        return streamed(job, data, how, keeps, *more)

    streamed = iteration._streamed_round
    monkeypatch.setattr(iteration, "_streamed_round", counted)
    CliRunner().invoke(app, command)
    assert not out.exists()
    assert sorted(path.name for path in (tmp_path / "plan.json.moekern").iterdir()) == ["round-1.json", "state"]
    CliRunner().invoke(app, command, catch_exceptions=False)
    assert passes == [0, 1, 1, 2]
    assert out.read_bytes() == whole
    assert not (tmp_path / "plan.json.moekern").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0.5", "--rounds", "5"], "--rounds 5: expected 1 to 4"),
        (["--keep", "1"], "--keep 1: fewer than the 2 that each token chooses"),
        (["--keep", "0.5", "--criterion", "leave_one_out"], "--criterion leave_one_out: needs the replay tier"),
        (["--keep", "0.5", "--criterion", "aimer"], "--data, --domain: aimer looks at weights alone"),
        (["--keep", "0.5", "--domain", "law"], "--domain law: the text has no such domain"),
        (["--keep", "0.5", "--criterion", "best"], "--criterion best: unknown"),
    ],
)
def test_errors_are_one_line(
    options: list[str], message: str, family_checkpoint: MakeCheckpoint, text: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, out = family_checkpoint("qwen3_moe"), tmp_path / "plan.json"
    command = ["iterate", str(source), "--data", text, "--sequence-length", "64", "--out", str(out), *options]
    monkeypatch.setattr("sys.argv", ["moekern", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("moekern: " + message)
    assert error.count("\n") == 1
    assert not out.exists()


def test_text_is_asked_for(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--criterion reap: it is measured on text: give --data"):
        iterate(family_checkpoint("qwen3_moe"), None, Method("reap", 4))
