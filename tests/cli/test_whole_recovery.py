"""The command `recover`: what it writes, under kills and in ranks, and what it refuses before anything is written."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli import whole_recovery
from moekern.data.text import Text
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.recovery import Training
from moekern.recovery.course import Course
from moekern.recovery.teacher import Teaching
from tests.helpers import families, killed, ranks
from tests.helpers.commands import Done, contents, document, model_and_ids, moekern
from tests.helpers.in_flight import random_plan
from tests.helpers.quantised_models import plain, twins

OUT = "moekern_recovery.json"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """What is run in threads has other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(_one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, ids, half of the model, and what the command makes of this."""
    folder = model_and_ids(tmp_path_factory.mktemp("work"), tokens=640)
    model = open_checkpoint(folder / "model")
    plan = random_plan(find_layout(model), 0)
    plan.save(folder / "plan.json")
    prune(model, plan, folder / "half")
    done = moekern(*command(folder, folder / "want"))
    assert done.returncode == 0, done.stderr
    return folder


def command(work: Path, out: Path, *more: object, pruned: str = "half", train: str = "router") -> tuple[object, ...]:
    text = ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 32, "--tokens", 640, "--dtype", "fp32")
    towards = ("--original", work / "model", "--train", train, "--step-tokens", 128, "--top", 8, "--every", 1)
    return ("recover", work / pruned, *towards, *text, *more, "--out", out)


def line_of(done: Done) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("moekern: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors whose bytes differ."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {name for name, value in old.items() if _bytes(value) != _bytes(new[name])}


def _bytes(value: torch.Tensor) -> bytes:
    return value.flatten().view(torch.uint8).numpy().tobytes()


def test_the_folder_is_the_trained_model_and_all_else_as_it_was(work: Path, tmp_path: Path) -> None:
    """transformers loads it; its losses are those that were told; verify finds it good; nothing else is left."""
    found = document(*command(work, tmp_path / "out", train="router,norms"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    record = json.loads((tmp_path / "out" / OUT).read_text())
    new = changed(work / "half", tmp_path / "out")
    assert new
    assert new <= set(record["tensors"])
    assert all(("norm" in name) or ("gate.weight" in name) for name in new)
    assert found["tensors"] == len(record["tensors"])
    assert record["curve"] == found["curve"]
    assert record["held"] == found["held"]
    original, out = families.load(work / "model"), families.load(tmp_path / "out")
    data = Text((f"a={work / 'ids.npy'}",), 640, 32).read(open_checkpoint(work / "half"))
    kl = count = 0.0
    for sample in Course.of(data, Training()).judged:
        ids = sample.batch.input_ids
        p, q = (families.forward(model, ids)[:, :-1].double().log_softmax(-1) for model in (original, out))
        likeliest = p.topk(8, dim=-1).indices
        mine, theirs = p.gather(-1, likeliest), q.gather(-1, likeliest)
        rest = 1 - mine.exp().sum(-1), 1 - theirs.exp().sum(-1)
        kl += float((mine.exp() * (mine - theirs)).sum() + (rest[0] * (rest[0] / rest[1]).log()).sum())
        count += sample.predicted
    told: Any = found["judged"]
    assert told["after"]["a"]["kl"] == pytest.approx(kl / count, rel=1e-2)
    done = moekern("verify", work / "model", work / "plan.json", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problems"] == []


def test_a_person_is_told_how_losses_fell(work: Path, tmp_path: Path) -> None:
    done = moekern(*command(work, tmp_path / "out"))
    assert done.returncode == 0
    said = done.stdout + done.stderr
    assert "KL to original" in said
    assert "4 tensors trained" in said
    assert "load it as any checkpoint" in said
    assert contents(tmp_path / "out") == contents(work / "want")


def test_factors_are_a_checkpoint_and_an_adapter_beside_it(work: Path, tmp_path: Path) -> None:
    out, adapter = tmp_path / "out", tmp_path / "out-adapter"
    given = command(work, out, "--adapter", "--epochs", 0, "--json", train="factors")
    adapter.mkdir()
    done = moekern(*given)
    assert (done.returncode, "out-adapter: exists already" in done.stderr) == (2, True), done.stderr
    adapter.rmdir()
    found = document(*given)
    assert found["adapter"] == str(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out)
    assert all(".mlp.experts." in name for name in config["target_parameters"])
    assert "experts as factors: " in str(found["notes"])
    assert document("verify", work / "model", work / "plan.json", out, "--json")["good"]
    assert "incomplete: its experts lack their products" in moekern("inspect", out).stderr
    assert not (tmp_path / "out.moekern").exists()


def test_the_next_token_alone_needs_no_original(work: Path, tmp_path: Path) -> None:
    text = ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 32, "--tokens", 640)
    plain = ("recover", work / "half", *text, "--kl", 0, "--next", 1, "--train", "norms", "--step-tokens", 256)
    alone = document(*plain, "--out", tmp_path / "alone")
    done = moekern(*plain, "--original", work / "model", "--out", tmp_path / "named")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "named").keys() == contents(tmp_path / "alone").keys()
    assert not changed(tmp_path / "named", tmp_path / "alone")
    assert "0.0000 -> 0.0000" not in done.stdout + done.stderr  # of a model that nothing was held against
    held: Any = alone["held"]
    assert held["after"]["a"]["nll"] <= held["before"]["a"]["nll"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--train", "rooter"), "--train rooter: expected some of bias, scale, router"),
        (("--train", ","), "--train: name what trains"),
        (("--top", "0"), "--top 0: expected a number of tokens, or vocabulary"),
        (("--top", "-3"), "--top -3: expected a number of tokens"),
        (("--top", "vocab"), "--top vocab: expected a number"),
        (("--lora-targets", "x"), "--lora-targets x: expected some of attention, experts, linear"),
        (("--lora-rank", "0"), "--lora-rank"),
        (("--lora-alpha", "0"), "--lora-alpha 0.0: expected more than 0"),
        (("--kl", "-1"), "--kl -1.0: expected 0 or more"),
        (("--kl", "nan"), "--kl nan: expected 0 or more"),
        (("--kl", "0"), "--kl 0 --next 0: nothing is left to train towards"),
        (("--next", "inf"), "--next inf: expected 0 or more"),
        (("--rate", "0"), "--rate 0.0: expected more than 0"),
        (("--rate", "1e38"), "--rate 1e+38: expected more than 0, and 1000 at the most"),
        (("--epochs", "1e300"), "--epochs 1e+300: expected more than 0, and 1000 at the most"),
        (("--epochs", "nan"), "--epochs nan: expected"),
        (("--step-tokens", "0"), "--step-tokens"),
        (("--every", "0"), "--every"),
        (("--patience", "0"), "--patience"),
        (("--warmup", "1.5"), "--warmup 1.5: expected a share"),
        (("--floor", "-0.1"), "--floor -0.1: expected a share"),
        (("--clip", "0"), "--clip 0.0: expected more than 0"),
        (("--decay", "-1"), "--decay -1.0: expected 0 or more"),
        (("--seed", "-1"), "--seed"),
        (("--train", "bias"), "--train bias: qwen3_moe: its routers have no bias"),
        (("--train", "norms,lora", "--lora-targets", "linear", "--original", "nowhere"), "nowhere"),
    ],
)
def test_options_of_no_sense_are_one_line(
    options: tuple[str, ...], line: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Teaching, "run", lambda *arguments: pytest.fail("it was computed"))
    done = moekern(*command(work, tmp_path / "out", *options))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert line in " ".join(done.stderr.split())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_missing_or_in_the_way_is_one_line(work: Path, tmp_path: Path) -> None:
    ids, out = ("--data", f"a={work / 'ids.npy'}"), ("--out", tmp_path / "out")
    assert "it trains on text: give --data" in line_of(moekern("recover", work / "half", *out))
    assert "name it (--original), or give --kl 0 --next 1" in line_of(moekern("recover", work / "half", *ids, *out))
    there = tmp_path / "there"
    there.mkdir()
    assert f"--out {there}: exists already" in line_of(moekern(*command(work, there)))
    inside = work / "half" / "out"
    assert f"{inside}" in line_of(moekern(*command(work, inside)))
    assert list(tmp_path.iterdir()) == [there]
    assert not inside.exists()
    assert not inside.with_name("out.moekern").exists()


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.whole)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(count: int, work: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    done = killed.command(command(work, tmp_path / "whole"), told)
    assert done is not None
    assert done.returncode == 0, done.stderr
    want, calls = contents(tmp_path / "whole"), killed.calls(told)
    assert want == contents(work / "want")
    rng = random.Random(count)
    for n in range(count):
        out = tmp_path / f"out{n}"
        at = rng.randrange(n * calls // count, (n + 1) * calls // count)
        assert killed.command(command(work, out), told, at) is None
        done = killed.command(command(work, out), told)
        assert done is not None
        assert done.returncode == 0 or (out.exists() and "exists already" in done.stderr), (at, done.stderr)
        assert contents(out) == want, at
        assert not out.with_name(f"{out.name}.moekern").exists(), at
        shutil.rmtree(out)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_where_nothing_is_better_no_byte_of_a_tensor_changes(dtype: str, work: Path, tmp_path: Path) -> None:
    """Whatever is computed in: weights of another type are not what the checkpoint holds."""
    options = ("--rate", 30, "--warmup", 0, "--dtype", dtype)
    done = moekern(*command(work, tmp_path / "out", *options, train="router,norms"))
    assert done.returncode == 0, done.stderr
    assert "nothing is changed; a lower --rate may help" in done.stdout + done.stderr
    assert changed(work / "half", tmp_path / "out") == set()
    done = moekern("verify", work / "model", work / "plan.json", tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_a_stopped_command_with_other_options_is_refused(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_recovery, "write_replaced", lambda *arguments, **options: _interrupt())
        done = moekern(*command(work, out))
    assert done.returncode == 130
    assert "stopped by Ctrl-C; the same command goes on after step 4" in done.stderr
    before = contents(tmp_path)
    line = line_of(moekern(*command(work, out, "--rate", 0.5)))
    assert "a stopped run is kept there, with another training" in line
    assert "--restart begins anew" in line
    assert contents(tmp_path) == before
    done = moekern(*command(work, out))
    assert done.returncode == 0
    assert contents(tmp_path) == {f"out/{name}": data for name, data in contents(work / "want").items()}


def test_what_a_command_leaves_that_was_killed_at_its_very_end_is_removed_by_the_next(
    work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_recovery.shutil, "rmtree", lambda path: _interrupt())
        assert moekern(*command(work, out)).returncode == 130
    assert (tmp_path / "out.moekern" / "recover").is_dir()
    before = contents(out)
    assert "exists already" in line_of(moekern(*command(work, out)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out.moekern").mkdir()
    (tmp_path / "out.moekern" / "work.lock").touch()  # of one that was killed even later
    assert "exists already" in line_of(moekern(*command(work, out)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(out) == before


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_quantised_weights_keep_their_bytes(tmp_path: Path) -> None:
    """Routers of an FP8 checkpoint train; its experts are refused by name before anything is computed."""
    model_and_ids(tmp_path, 640)
    source, _ = twins(plain("qwen3_moe", tmp_path / "plain"), tmp_path, "fp8_static", only=".experts.")
    layout = find_layout(open_checkpoint(source))
    prune(source, random_plan(layout, 0), tmp_path / "half")
    shutil.rmtree(tmp_path / "model")
    source.rename(tmp_path / "model")
    line = line_of(moekern(*command(tmp_path, tmp_path / "refused", train="experts")))
    assert "model.layers.0.mlp.experts.0." in line
    assert "stored as F8_E4M3" in line
    assert not (tmp_path / "refused").exists()
    done = moekern(*command(tmp_path, tmp_path / "out", train="router,norms"))
    assert done.returncode == 0, done.stderr
    new = changed(tmp_path / "half", tmp_path / "out")
    assert new
    assert not any(".experts." in name for name in new)


@pytest.mark.parametrize("name", ["deepseek_v3", pytest.param("nemotron_h", marks=pytest.mark.whole)])
def test_bfloat16_and_parts_beside_the_experts(name: str, tmp_path: Path) -> None:
    """Of routed experts' down projections alone: shared experts, attention and all others keep their bytes."""
    model_and_ids(tmp_path, 640)
    shutil.rmtree(tmp_path / "model")
    families.save(name, tmp_path / "model", dtype=torch.bfloat16)
    layout = find_layout(open_checkpoint(tmp_path / "model"))
    prune(tmp_path / "model", random_plan(layout, 0), tmp_path / "half")
    done = moekern(*command(tmp_path, tmp_path / "out", "--rate", 0.01, "--dtype", "bf16", train="down"))
    assert done.returncode == 0, done.stderr
    new = changed(tmp_path / "half", tmp_path / "out")
    assert new
    assert all(".experts." in name and "down_proj" in name for name in new)
    assert families.forward(families.load(tmp_path / "out"), families.input_ids(name)).isfinite().all()


@pytest.mark.xdist_group("ranks")
def test_two_ranks_give_the_same_within_rounding(work: Path, tmp_path: Path) -> None:
    words = command(work, tmp_path / "out")
    for rank, done in enumerate(ranks.torchrun(tmp_path / "words", 2, *words)):
        assert done.returncode == 0, (rank, done.stderr)
        assert rank == 0 or (done.stdout, done.stderr) == ("", "")
    got, want = tensors(tmp_path / "out"), tensors(work / "want")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4, msg=name)
    assert changed(work / "half", tmp_path / "out") == changed(work / "half", work / "want")
    assert not (tmp_path / "out.moekern").exists()


def _dies(rank: int) -> None:
    from moekern.recovery.steps import Steps

    step = Steps.step

    def last(self: Steps, *arguments: Any) -> Any:
        if rank == 1 and self.trained.steps == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    Steps.step = last  # type: ignore[method-assign]


@pytest.mark.whole  # tests/team has the like of every command
@pytest.mark.xdist_group("ranks")
def test_a_rank_that_dies_ends_it_and_the_same_ranks_go_on(work: Path, tmp_path: Path) -> None:
    words = command(work, tmp_path / "out")
    first, second = ranks.torchrun(tmp_path / "words", 2, *words, before=_dies)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode not in (0, -signal.SIGKILL)
    assert "rank 1" in first.stderr
    assert not (tmp_path / "out").exists()
    assert "another processes" in line_of(moekern(*words))
    first, second = ranks.torchrun(tmp_path / "words", 2, *words)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "going on after step 1" in first.stderr


def test_different_numbers_of_experts_and_mtp_layers(tmp_path: Path) -> None:
    """Layers that kept 4 and 6 experts train; the MTP layer's bytes stay."""
    model_and_ids(tmp_path, 640)
    shutil.rmtree(tmp_path / "model")
    model = families.save("deepseek_v3", tmp_path / "model")
    with_mtp(model)
    layout = find_layout(open_checkpoint(model))
    layers = {key: LayerPlan((0, 1, 4, 5) if n % 2 else (0, 1, 2, 4, 5, 6)) for n, key in enumerate(layout.layers)}
    plan = Plan(layers, {"allow_nonuniform": True, "mtp": "prune"})
    plan.save(tmp_path / "plan.json")
    prune(model, plan, tmp_path / "half")
    done = moekern(*command(tmp_path, tmp_path / "out", "--rate", 0.01, train="experts,router,norms"))
    assert done.returncode == 0, done.stderr
    new = changed(tmp_path / "half", tmp_path / "out")
    for i in (1, 2, 3):
        assert any(name.startswith(f"model.layers.{i}.mlp.experts.") for name in new)
    assert "model.norm.weight" in new
    assert not any(name.startswith("model.layers.4.") or "shared" in name for name in new)
    done = moekern("verify", model, tmp_path / "plan.json", tmp_path / "out")
    assert done.returncode == 0, done.stderr + done.stdout


def with_mtp(model: Path) -> None:
    """A layer behind the last one, as DeepSeek-V3 has it: that one's weights again, and its own."""
    last = {name: value for name, value in tensors(model).items() if name.startswith("model.layers.3.")}
    new = {name.replace("layers.3.", "layers.4."): value.clone() for name, value in last.items()}
    H = families.HIDDEN
    for name, shape in (("eh_proj.weight", (H, 2 * H)), ("enorm.weight", (H,)), ("hnorm.weight", (H,))):
        new[f"model.layers.4.{name}"] = torch.ones(shape)
    save_file(new, model / "model-mtp.safetensors", {"format": "pt"})
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(new, "model-mtp.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
