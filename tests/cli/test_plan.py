"""The planning commands as a user types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.estimation.footprint import Fit
from moekern.plan.document import Plan
from moekern.plan.several import Planning, make_plans
from moekern.plan.targets import parse_target
from moekern.statistics.file import Statistics
from tests.helpers import ROOT, families
from tests.helpers.commands import contents, document, moekern


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and statistics of two domains."""
    folder = tmp_path_factory.mktemp("planning")
    families.save("qwen3_moe", folder / "model")
    for i, name in enumerate(("a", "b")):
        np.save(folder / f"{name}.npy", np.random.default_rng(i).integers(16 + 40 * i, 56 + 40 * i, 300))
    data = [part for name in ("a", "b") for part in ("--data", f"{name}={folder / f'{name}.npy'}")]
    out = folder / "s.safetensors"
    done = moekern("calibrate", folder / "model", *data, "--sequence-length", 30, "--out", out)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("command", ["plan", "score"])
def test_a_plan_of_statistics_imports_nothing_that_runs_models(work: Path, tmp_path: Path, command: str) -> None:
    """Which takes longer, and more memory, than the plan."""
    options = ["--keep", "4", "--out", str(tmp_path / "plan.json")] if command == "plan" else []
    code = (
        "import sys\nfrom moekern.cli.app import main\ntry:\n    main()\nfinally:\n"
        "    print([name for name in ('transformers', 'moekern.model', 'moekern.calibration') if name in sys.modules])"
    )
    asked = [sys.executable, "-c", code, command, str(work / "s.safetensors"), *options]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_plans_that_are_there_already_are_left(work: Path, tmp_path: Path) -> None:
    """A run that was stopped between two plans goes on; another plan is never written over, and nothing is before."""
    several = ("plan", work / "s.safetensors", "--keep", 2, "--keep", 4, "--keep", 6, "--out", tmp_path / "plans")
    one = ("plan", work / "s.safetensors", "--keep", 4, "--out", tmp_path / "plan.json")
    words = ("convert", tmp_path / "plan.json", "--to", "moekern", "--out", tmp_path / "words.json")
    for command in (several, one, words):
        assert moekern(*command).returncode == 0
    made = contents(tmp_path)
    (tmp_path / "plans/gated_norm-2.json").unlink()
    written = (tmp_path / "plan.json").stat().st_mtime_ns
    for command, times in ((several, 2), (one, 1), (words, 1)):
        again = moekern(*command)
        assert again.returncode == 0, again.stderr
        assert again.stderr.count("already") == times
    assert contents(tmp_path) == made
    assert (tmp_path / "plan.json").stat().st_mtime_ns == written
    (tmp_path / "plans/gated_norm-2.json").unlink()
    for path in ("plans/gated_norm-6.json", "plan.json", "words.json"):
        (tmp_path / path).write_bytes(made[path].replace(b"moekern.plan/1", b"moekern.plan/2"))
    changed = contents(tmp_path)
    for command, path in ((several, "plans/gated_norm-6.json"), (one, "plan.json")):
        again = moekern(*command)
        assert again.returncode == 2
        assert f"--out {tmp_path / path}: exists already" in again.stderr
    assert contents(tmp_path) == changed


def test_several_plans_at_once(work: Path, tmp_path: Path) -> None:
    arguments = (
        "plan",
        work / "s.safetensors",
        "--criterion",
        "reap",
        "--criterion",
        "hope",
        "--keep",
        "0.5",
        "--keep",
        6,
    )
    made = document(*arguments, "--out", tmp_path / "plans")["plans"]
    names = {"reap-0.5", "reap-6", "hope-0.5", "hope-6"}
    assert set(made) == names  # type: ignore[call-overload]
    assert {p.name for p in (tmp_path / "plans").iterdir()} == {f"{name}.json" for name in names}
    alone = document(
        "plan", work / "s.safetensors", "--criterion", "hope", "--keep", "50%", "--out", tmp_path / "p.json"
    )
    assert alone["digest"] == made["hope-0.5"]["digest"]  # type: ignore[index]
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "plans/hope-0.5.json").read_bytes()
    assert moekern(*arguments, "--out", tmp_path / "x-{}.json").returncode == 0
    assert (tmp_path / "x-reap-6.json").read_bytes() == (tmp_path / "plans/reap-6.json").read_bytes()
    before = contents(tmp_path)
    for out, message in (("p.json", "4 plans need a folder"), ("new.json", "{}")):
        done = moekern(*arguments, "--out", tmp_path / out)
        assert done.returncode == 2
        assert message in done.stderr
    assert contents(tmp_path) == before
    paths = [tmp_path / "plans" / f"{name}.json" for name in sorted(names)]
    compared = document("compare", *paths, "--statistics", work / "s.safetensors")
    assert len(compared["pairs"]) == 6  # type: ignore[arg-type]
    dropped = compared["dropped"]
    assert dropped[str(paths[0])]["outputs"] > dropped[str(paths[1])]["outputs"]  # type: ignore[index]  # 4 kept, 6 kept
    assert "kept by both" in moekern("compare", *paths).stdout


def test_different_counts_from_statistics_to_verified_checkpoint(work: Path, tmp_path: Path) -> None:
    arguments = ("plan", work / "s.safetensors", "--keep", 5, "--budget", "adaptive", "--floor", 3)
    refused = moekern(*arguments, "--out", tmp_path / "plan.json")
    assert refused.returncode == 2
    assert "engines load one expert count for all layers" in refused.stderr
    made = document(*arguments, "--allow-nonuniform", "--out", tmp_path / "plan.json")
    kept = made["kept"]
    assert sum(kept.values()) == 5 * len(kept)  # type: ignore[attr-defined]
    out = tmp_path / "out"
    document("prune", work / "model", tmp_path / "plan.json", "--out", out)
    assert document("verify", work / "model", tmp_path / "plan.json", out, "--forward")["good"] is True
    again = ("calibrate", out, "--data", f"a={work / 'a.npy'}", "--sequence-length", 30, "--out", tmp_path / "again.st")
    assert document(*again)["num_experts"] == max(kept.values())  # type: ignore[attr-defined]
    measured = Statistics.load(tmp_path / "again.st")
    assert {key: measured.layer(key).num_experts for key in measured.layers} == kept
    checked = document("check", out)
    assert checked["uniform"] is False
    assert checked["experts"] == kept
    assert not any(row["runs"] for row in checked["targets"].values())  # type: ignore[attr-defined]
    done = moekern("check", out)
    assert done.returncode == 0
    assert "no engine loads this" in done.stderr
    assert moekern("check", out, "--target", "vllm").returncode == 1
    assert document("inspect", out)["num_experts"] == max(kept.values())  # type: ignore[attr-defined]


def test_check_says_where_a_checkpoint_runs(work: Path) -> None:
    """Saved by transformers 5: mlx-lm's code finds some of its keys under other names."""
    checked = document("check", work / "model")
    assert {name: row["runs"] for name, row in checked["targets"].items()} == {  # type: ignore[attr-defined]
        **dict.fromkeys(("transformers", "vllm", "sglang", "llama.cpp", "ik_llama.cpp", "mistral.rs"), True),
        "mlx-lm": False,
    }
    done = moekern("check", work / "model", "--target", "sglang:ep=3", "--target", "vllm")
    assert done.returncode == 1
    assert "multiple of ep=3; nearest that runs: 6" in done.stdout
    assert moekern("check", work / "model", "--target", "sglang:ep=4").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", 99), "more than the 8 experts there are"),
        (("--keep", 4, "--target", "sglang:ep=3"), "experts must be a multiple of ep=3"),
        (("--fit", "1KiB"), "--fit 1.0 KiB: nothing fits"),
        ((), "--keep, --fit: give one of the two"),
    ],
)
def test_options_are_checked_before_weights_are_read(
    words: tuple[object, ...], message: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moekern.measurement.weights.weigh", lambda *a, **k: pytest.fail("weights were read"))
    done = moekern("plan", work / "model", "--criterion", "ewn", *words, "--out", tmp_path / "plan.json")
    assert done.returncode == 2
    assert message in done.stderr


def test_check_says_what_is_not_known(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "model", tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    other = {"architectures": ["FlexOlmoForCausalLM"], "model_type": "flex_olmo"}
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, **other}))
    done = moekern("check", tmp_path / "in", "--target", "mistral.rs")
    assert done.returncode == 0
    assert "not known" in done.stdout
    done = moekern("check", tmp_path / "in", "--target", "llama.cpp")
    assert done.returncode == 1
    assert "its converter does not know" in done.stdout


def test_fit_keeps_what_fits(work: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(work / "model").nbytes
    reserving = ("plan", work / "s.safetensors", "--model", work / "model")
    arguments = (*reserving, "--reserve", "0")
    made = document(*arguments, "--fit", f"{whole - 1}B", "--context", 0, "--out", tmp_path / "plan.json")
    assert made["kept"] == 7
    document("prune", work / "model", tmp_path / "plan.json", "--out", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").nbytes == made["fit"]["weights"] <= whole - 1  # type: ignore[index]
    cached = document(*arguments, "--fit", f"{whole}B", "--context", 100, "--out", tmp_path / "cached.json")
    assert cached["fit"]["cache"] > 0  # type: ignore[index]
    assert cached["kept"] < 8  # type: ignore[operator]
    even = document(*arguments, "--fit", f"{whole - 1}B", "--target", "sglang:ep=4", "--out", tmp_path / "even.json")
    assert even["kept"] == 4
    said = moekern(*reserving, "--fit", "1GiB", "--out", tmp_path / "all.json").stderr
    assert "KV cache" in said
    assert "limit 1.0 GiB, of which 153.6 MiB are left to activations" in said
    least = open_checkpoint(tmp_path / "out").nbytes
    for reserve, kept in ((whole - least, 7), (whole - least + 1, 6)):
        name = tmp_path / f"{reserve}.json"
        assert document(*reserving, "--fit", f"{whole}B", "--reserve", reserve, "--out", name)["kept"] == kept


@pytest.mark.parametrize("reserve", ["100%", "ten", "2GiB"])
def test_a_reserve_that_is_none(work: Path, tmp_path: Path, reserve: str) -> None:
    arguments = ("plan", work / "s.safetensors", "--model", work / "model", "--fit", "1GiB", "--reserve", reserve)
    done = moekern(*arguments, "--out", tmp_path / "plan.json")
    assert (done.returncode, done.stderr.startswith("moekern: --reserve")) == (2, True)


def test_counts_that_an_engine_runs_slower_are_told_with_the_nearest(work: Path, tmp_path: Path) -> None:
    arguments = ("plan", work / "s.safetensors", "--keep", 7, "--target", "vllm:ep=2", "--out", tmp_path / "plan.json")
    said = moekern(*arguments).stderr
    assert "vllm:ep=2: balancing (EPLB) needs a multiple of ep=2; nearest count without this: 4 or 8" in said


@pytest.mark.parametrize("source", ["statistics", "statistics and model", "weights"])
def test_what_only_the_models_config_tells_is_told_where_it_is_known(source: str, work: Path, tmp_path: Path) -> None:
    """FP8 kernels take other counts, and ranks divide heads: a plan of statistics alone has seen neither."""
    model = tmp_path / "model"
    shutil.copytree(work / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    given = (work / "s.safetensors",) if source.startswith("statistics") else (model, "--criterion", "aimer")
    given = (*given, "--model", model) if source.endswith("model") else given
    known = source != "statistics"
    done = moekern("plan", *given, "--keep", 6, "--target", "vllm", "--out", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert ("vllm: its TRT-LLM kernels for FP8 take multiples of 4; nearest" in done.stderr) is known
    done = moekern("plan", *given, "--keep", 4, "--target", "vllm:tp=3", "--out", tmp_path / "ranks.json")
    assert (done.returncode, "tp=3 does not divide the 4 attention heads" in done.stderr) == (2 * known, known)


def test_iterate_is_held_to_targets_before_it_measures_and_tells_what_is_slower(work: Path, tmp_path: Path) -> None:
    command = ("iterate", work / "model", "--data", f"a={work / 'a.npy'}", "--sequence-length", 30)
    done = moekern(*command, "--keep", 6, "--target", "sglang:ep=4", "--out", tmp_path / "plan.json")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--keep 6: sglang:ep=4 would not run it: experts must be a multiple of ep=4" in done.stderr
    done = moekern(*command, "--keep", 6, "--target", "vllm", "--out", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert "vllm: its fused top-k kernel is made for" in done.stderr


def test_targets_go_by_the_models_own_config(work: Path, tmp_path: Path) -> None:
    """Class names and weight formats are in no statistics: --model tells them."""
    model = tmp_path / "model"
    shutil.copytree(work / "model", model)
    config = json.loads((model / "config.json").read_text())
    statistics = Statistics.load(work / "s.safetensors")

    def planned(target: str, changed: dict[str, object], fit: Fit | None = None) -> list[str]:
        (model / "config.json").write_text(json.dumps(config | changed))
        keeps = () if fit else (4,)
        options = Planning(("reap",), keeps, targets=(parse_target(target),), model=model, fit=fit)
        return list(make_plans(statistics, options))

    assert planned("vllm", {}) == ["reap-4"]
    awq = {"quantization_config": {"quant_method": "awq"}}
    for changed, target, words in (
        ({"architectures": ["OwnMoeForCausalLM"]}, "vllm", "has no OwnMoeForCausalLM"),
        (awq, "llama.cpp", "does not read experts stored as awq"),
    ):
        for fit in (None, Fit(1 << 30, None, 0, 1)):
            with pytest.raises(InputError, match=f"{target} would not run it: .*{words}.*no other count would help"):
                planned(target, changed, fit)
    assert planned("vllm", awq) == ["reap-4"]


def test_guards_reach_the_plan(work: Path, tmp_path: Path) -> None:
    guards = ("--guard", "a=3", "--suppress", "b=2", "--domain-floor", "0.3", "--keep-always", "1:0", "--protect-super")
    made = document("plan", work / "s.safetensors", "--keep", 6, *guards, "--out", tmp_path / "plan.json")["guards"]
    assert sum(len(e) for e in made["guard"][0]["experts"].values()) == 3  # type: ignore[index]
    plan = Plan.load(tmp_path / "plan.json")
    for key, experts in made["guard"][0]["experts"].items():  # type: ignore[index]
        assert set(experts) <= set(plan.layers[key].keep)
    for key, experts in made["suppress"][0]["experts"].items():  # type: ignore[index]
        assert not set(experts) & set(plan.layers[key].keep)
    assert 0 in plan.layers["1"].keep


def test_the_plan_decides_about_mtp_layers(tmp_path: Path, work: Path) -> None:
    from tests.helpers import synthetic

    source = synthetic.write(tmp_path / "in", *synthetic.deepseek_v3())
    keep = {key: {"keep": [0, 1, 4, 5]} for key in ("1", "2")}
    for said, expected in (("drop", "MTP layers removed"), ("keep", "all experts kept"), (None, "largest router rows")):
        plan = tmp_path / f"{said}.json"
        plan.write_text(
            json.dumps({"format": "moekern.plan/1", "layers": keep, "provenance": {"mtp": said} if said else {}})
        )
        assert expected in str(document("prune", source, plan, "--out", tmp_path / f"out-{said}")["mtp"])
        assert document("verify", source, plan, tmp_path / f"out-{said}")["good"] is True
    over = document("prune", source, tmp_path / "drop.json", "--mtp", "keep", "--out", tmp_path / "over")
    assert "all experts kept" in str(over["mtp"])
    (tmp_path / "bad.json").write_text((tmp_path / "drop.json").read_text().replace('"drop"', '"burn"'))
    done = moekern("prune", source, tmp_path / "bad.json", "--out", tmp_path / "bad")
    assert done.returncode == 2
    assert "provenance.mtp is 'burn'" in done.stderr
    made = document("plan", work / "s.safetensors", "--keep", 4, "--mtp", "drop", "--out", tmp_path / "made.json")
    assert made["mtp"] == "drop"


def test_plans_change_hands(work: Path, tmp_path: Path) -> None:
    shutil.copy(work / "s.safetensors", tmp_path / "s.safetensors")
    document("plan", work / "s.safetensors", "--keep", 4, "--out", tmp_path / "plan.json")
    for tool in ("llm-compressor", "compressed-tensors"):
        theirs, ours = tmp_path / f"{tool}.json", tmp_path / f"back-{tool}.json"
        document("convert", tmp_path / "plan.json", "--to", tool, "--model", work / "model", "--out", theirs)
        document("convert", theirs, "--to", "moekern", "--model", work / "model", "--out", ours)
        keeps = [
            {key: layer.keep for key, layer in Plan.load(p).layers.items()} for p in (tmp_path / "plan.json", ours)
        ]
        assert keeps[0] == keeps[1]
        assert Plan.load(ours).provenance["fingerprint"] == open_checkpoint(work / "model").fingerprint
    document("prune", work / "model", ours, "--out", tmp_path / "out")


WRONG = {
    "neither keep nor fit": (("plan", "S"), "--keep, --fit: give one of the two"),
    "both": (("plan", "S", "--keep", 4, "--fit", "1GiB"), "--keep, --fit: give one of the two"),
    "fit without a model": (("plan", "S", "--fit", "1GiB"), "add --model MODEL"),
    "fit of no size": (("plan", "S", "--fit", "big", "--model", "M"), "--fit big: expected a size"),
    "fit of nothing": (("plan", "S", "--fit", "0", "--model", "M"), "--fit: expected at least one byte"),
    "nothing fits": (
        ("plan", "S", "--fit", "1KiB", "--model", "M"),
        "--fit 1.0 KiB: nothing fits; the smallest this model gets is",
    ),
    "bits without fit": (("plan", "S", "--keep", 4, "--bits", 4), "go with --fit"),
    "twice": (("plan", "S", "--keep", "0.5", "--keep", "50%"), "given twice"),
    "budget": (("plan", "S", "--keep", 4, "--budget", "fair"), "--budget fair: expected one of"),
    "floor": (("plan", "S", "--keep", 4, "--budget", "global", "--floor", "no"), "--floor no: expected a share"),
    "multiple": (("plan", "S", "--keep", 4, "--multiple-of", 0), "--multiple-of 0: expected a count"),
    "target": (("plan", "S", "--keep", 4, "--target", "tgi"), "--target tgi: expected one of"),
    "target that stops": (("plan", "S", "--keep", 4, "--target", "sglang:ep=8"), "nearest that runs: 8"),
    "no count for the target": (
        ("plan", "S", "--fit", "1GiB", "--model", "M", "--target", "sglang:ep=9"),
        "multiple of ep=9",
    ),
    "guard": (("plan", "S", "--keep", 4, "--guard", "law"), "--guard law: no such domain"),
    "always": (("plan", "S", "--keep", 4, "--keep-always", "x"), "--keep-always x: expected LAYER:EXPERT"),
    "check": (("check", "S"), "is a file; give the checkpoint's folder"),
    "one plan": (("compare", "P"), "one plan alone"),
    "the same plan": (("compare", "P", "P"), "named twice"),
    "not a plan": (("compare", "S", "P"), "name a file that `moekern plan` wrote"),
    "not statistics": (("plan", "P", "--keep", 4), "name one that `moekern calibrate` wrote"),
    "convert without a model": (("convert", "P", "--to", "llm-compressor"), "add --model MODEL"),
    "convert statistics": (("convert", "S", "--to", "moekern"), "not a readable plan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_and_writes_nothing(case: str, work: Path, tmp_path: Path) -> None:
    plan = tmp_path / "p.json"
    plan.write_text('{"format": "moekern.plan/1", "layers": {"0": {"keep": [0, 1]}}}')
    places = {"S": work / "s.safetensors", "M": work / "model", "P": plan}
    words, message = WRONG[case]
    arguments = [places.get(str(word), word) for word in words]
    before = contents(tmp_path)
    done = moekern(*arguments, *(("--out", tmp_path / "out") if words[0] in ("plan", "convert") else ()))
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("moekern: ")
    assert message in lines[0]
    assert contents(tmp_path) == before


def test_what_a_plan_could_not_do_is_said(work: Path, tmp_path: Path) -> None:
    """By `plan`, `iterate` and `run`, as a line and, where programs read, as a note and a key of the plan."""
    (tmp_path / "same.py").write_text("import torch\n\n\ndef same(s):\n    return torch.ones(s.num_experts).double()\n")
    same, statistics = f"{tmp_path / 'same.py'}:same", work / "s.safetensors"
    done = moekern("plan", statistics, "--keep", "0.5", "--criterion", same, "--out", tmp_path / "p.json")
    assert "all scores are equal in 4 of 4 layers (0, 1, 2, 3)" in " ".join(done.stderr.split())
    told = document("plan", statistics, "--keep", "0.5", "--criterion", same, "--out", tmp_path / "q.json")
    assert told["ties"] == {str(i): 8 for i in range(4)}
    data = ("--data", f"a={work / 'a.npy'}", "--sequence-length", 30)
    for n, command in enumerate((
        ("plan", statistics, "--out", tmp_path / "all.json"),
        ("iterate", work / "model", *data, "--out", tmp_path / "iterated.json"),
        ("run", work / "model", *data, "--no-forward", "--out", tmp_path / "out"),
    )):  # fmt: skip
        done = moekern(*command, "--keep", "0.95")
        assert done.returncode == 0, (n, done.stderr)
        assert "7.6 of 8 experts is rounded to all of them: nothing is dropped" in " ".join(done.stderr.split())
