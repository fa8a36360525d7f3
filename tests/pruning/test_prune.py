"""Pruned folders, byte for byte, on small checkpoints in every quantised layout."""

import json
import os
import re
import resource
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.config import dumped_like
from moekern.pruning.prune import MANIFEST, PLAN_FILE, prune
from moekern.verification.tensors import verify
from tests.helpers.synthetic import (
    COMPANIONS,
    EXPERTS,
    cut,
    data,
    deepseek_v3,
    gpt_oss_mxfp4,
    qwen3,
    read,
    read_shard,
    tree,
    write,
    write_parts,
)

KEEP = {"0": (0, 2, 3, 7), "1": (1, 4, 5, 6)}
INDEXED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(.+)")


def plan_of(keep: dict[str, tuple[int, ...]]) -> Plan:
    return Plan({key: LayerPlan(kept) for key, kept in keep.items()}, {"criterion": "test"})


PLAN = plan_of(KEEP)


def expected(tensors: Any, keep: dict[str, tuple[int, ...]]) -> Any:
    """What pruning must leave of a checkpoint with experts indexed or stacked under model.layers.N.mlp."""
    want = {}
    for name, tensor in tensors.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        found = INDEXED.fullmatch(name)
        if layer not in keep:
            want[name] = tensor
        elif found:
            if int(found[2]) in keep[layer]:
                new = keep[layer].index(int(found[2]))
                want[f"model.layers.{layer}.mlp.experts.{new}.{found[3]}"] = tensor
        elif re.search(r"mlp\.(gate|router|experts)\.", name):
            want[name] = cut(tensor, keep[layer])
        else:
            want[name] = tensor
    return want


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write(tmp_path / "in", *qwen3())
    (folder / "tokenizer.json").write_bytes(b'{"odd": "\xc3\xa9"}  ')
    (folder / "empty.txt").write_bytes(b"")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.mark.parametrize("interleave", [False, True], ids=["together", "spread"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("companions", COMPANIONS)
def test_indexed_experts_keep_their_bytes(tmp_path, companions, shards, interleave):
    config, tensors = qwen3(companions)
    folder = write(tmp_path / "in", config, tensors, shards, pad=3, interleave=interleave)
    report = prune(folder, PLAN, tmp_path / "out")
    assert read(tmp_path / "out") == expected(tensors, KEEP)
    assert verify(folder, PLAN, tmp_path / "out").problems == ()
    assert (report.experts_before, report.experts_after, report.layers) == (EXPERTS, 4, 2)
    assert (report.shards_in, report.shards_out) == (shards, shards)
    assert report.tensors_in - report.tensors_out == 2 * 4 * 3 * len(COMPANIONS[companions])
    assert report.bytes_out == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_stacked_mxfp4_experts_keep_their_bytes(tmp_path):
    config, tensors = gpt_oss_mxfp4()
    folder = write(tmp_path / "in", config, tensors)
    prune(folder, PLAN, tmp_path / "out")
    assert read(tmp_path / "out") == expected(tensors, KEEP)
    assert verify(folder, PLAN, tmp_path / "out").problems == ()
    assert json.loads((tmp_path / "out/config.json").read_text())["num_local_experts"] == 4


def test_odd_sizes_and_empty_tensors(tmp_path):
    config, tensors = qwen3("odd")
    rng = np.random.default_rng(0)
    tensors = {"a": data(rng, "U8", [1]), **tensors, "y": data(rng, "BF16", [0, 7]), "z": data(rng, "U8", [])}
    folder = write(tmp_path / "in", config, tensors, shards=2)
    prune(folder, PLAN, tmp_path / "out")
    assert read(tmp_path / "out") == expected(tensors, KEEP)
    assert verify(folder, PLAN, tmp_path / "out").problems == ()


def test_headers_keep_order_and_metadata_and_end_on_a_multiple_of_8(source, tmp_path):
    prune(source, PLAN, tmp_path / "out")
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        raw = path.read_bytes()
        stop = 8 + int.from_bytes(raw[:8], "little")
        _, header = read_shard(path)
        assert header.pop("__metadata__") == {"format": "pt"}
        assert stop % 8 == 0
        assert raw[8:stop].rstrip(b" ").endswith(b"}")
        before = expected(read_shard(source / path.name)[0], KEEP)
        assert list(header) == list(before)


def test_a_shard_that_loses_everything_goes_and_the_rest_is_renumbered(tmp_path):
    config, tensors = qwen3()
    gone = [name for name in tensors if (m := INDEXED.fullmatch(name)) and int(m[2]) not in KEEP[m[1]]]
    rest = [name for name in tensors if name not in gone]
    folder = write(tmp_path / "in", config, {})
    for path in folder.glob("model*"):
        path.unlink()
    write_parts(folder, tensors, [rest[:5], gone, rest[5:]])
    report = prune(folder, PLAN, tmp_path / "out")
    assert (report.shards_in, report.shards_out) == (3, 2)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    assert read(tmp_path / "out") == expected(tensors, KEEP)
    assert verify(folder, PLAN, tmp_path / "out").problems == ()


def test_the_index_counts_what_is_there(source, tmp_path):
    prune(source, PLAN, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = read(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(int(np.prod(shape)) for _, shape, _ in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name, shard in index["weight_map"].items():
        assert name in read_shard(tmp_path / "out" / shard)[0]


def test_two_runs_give_the_same_bytes_and_leave_the_source_alone(source, tmp_path):
    before = tree(source)
    prune(source, PLAN, tmp_path / "a")
    prune(source, PLAN, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert tree(source) == before


def test_side_files_are_copied_and_pickles_are_not(source, tmp_path):
    prune(source, PLAN, tmp_path / "out")
    before, after = tree(source), tree(tmp_path / "out")
    for name in ("tokenizer.json", "empty.txt", "additional_chat_templates/tool.jinja"):
        assert after[name] == before[name]
    assert "pytorch_model.bin" not in after


def test_the_plan_lies_beside_the_weights(source, tmp_path):
    prune(source, PLAN, tmp_path / "out")
    record = json.loads((tmp_path / "out" / PLAN_FILE).read_text())
    assert record["plan"] == json.loads(PLAN.to_json())
    assert record["plan_sha256"] == PLAN.digest
    assert record["mtp"] == "prune"
    again = plan_of({"0": (0, 1), "1": (2, 3)})
    prune(tmp_path / "out", again, tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / PLAN_FILE).read_text())["source"] == record
    assert verify(tmp_path / "out", again, tmp_path / "twice").problems == ()
    assert read(tmp_path / "twice") == expected(expected(read(source), KEEP), {"0": (0, 1), "1": (2, 3)})


def test_modes_honour_the_umask(source, tmp_path):
    before = os.umask(0o027)
    try:
        prune(source, PLAN, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_progress_ends_at_the_total(source, tmp_path):
    seen: list[tuple[int, int]] = []
    prune(source, PLAN, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    total = sum(len(raw) for name, raw in tree(tmp_path / "out").items() if name != MANIFEST)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("mtp", "kept", "line"),
    [
        ("prune", None, r"MTP layer 3: 4 experts kept, those with the largest router rows, since"),
        ("drop", (), r"MTP layers removed \(model.layers.3.\)"),
        ("keep", tuple(range(EXPERTS)), r"MTP layer 3: all experts kept; engines size MTP layers by the same count"),
    ],
    ids=["prune", "drop", "keep"],
)
def test_mtp_layers(tmp_path, mtp, kept, line):
    config, tensors = deepseek_v3()
    folder = write(tmp_path / "in", config, tensors, shards=4)
    keep = {"1": (0, 3, 5, 6), "2": (1, 2, 4, 7)}
    report = prune(folder, plan_of(keep), tmp_path / "out", mtp=mtp)
    assert re.match(line, report.mtp)
    if kept is None:
        weight = np.frombuffer(tensors["model.layers.3.mlp.gate.weight"][2], "<u2").astype("<u4") << 16
        norms = np.linalg.norm(weight.view("<f4").reshape(EXPERTS, -1), axis=1)
        kept = (*sorted(np.argsort(-norms[:4])[:2].tolist()), *sorted((np.argsort(-norms[4:])[:2] + 4).tolist()))
    if mtp == "drop":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.3.")}
    assert read(tmp_path / "out") == expected(tensors, keep | ({"3": kept} if len(kept) == 4 else {}))
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after == config | {"n_routed_experts": 4} | ({"num_nextn_predict_layers": 0} if mtp == "drop" else {})
    assert verify(folder, plan_of(keep), tmp_path / "out").problems == ()
    assert verify(folder, plan_of(keep), tmp_path / "out", mtp=mtp).problems == ()


def test_a_plan_may_name_the_mtp_layer(tmp_path):
    config, tensors = deepseek_v3()
    folder = write(tmp_path / "in", config, tensors)
    keep = {"1": (0, 3, 5, 6), "2": (1, 2, 4, 7), "3": (0, 1, 6, 7)}
    report = prune(folder, plan_of(keep), tmp_path / "out")
    assert report.mtp.startswith("MTP layer 3: 4 experts kept, as planned")
    assert read(tmp_path / "out") == expected(tensors, keep)
    assert verify(folder, plan_of(keep), tmp_path / "out").problems == ()


@pytest.mark.parametrize("bad", [b"\xc0\x7f", b"\x80\xff"], ids=["nan", "inf"])
def test_an_mtp_router_that_is_not_finite_ranks_no_expert(tmp_path, bad):
    config, tensors = deepseek_v3()
    dtype, shape, raw = tensors["model.layers.3.mlp.gate.weight"]
    tensors["model.layers.3.mlp.gate.weight"] = dtype, shape, raw[:8] + bad + raw[10:]
    folder = write(tmp_path / "in", config, tensors)
    plan = plan_of({"1": (0, 3, 5, 6), "2": (1, 2, 4, 7)})
    with pytest.raises(InputError, match=r"in: model\.layers\.3: expert 1: rows of the router are not finite, .*--mtp"):
        prune(folder, plan, tmp_path / "out")
    prune(folder, plan, tmp_path / "out", mtp="keep")
    assert verify(folder, plan, tmp_path / "out").problems == ()


def test_config_changes_in_its_counts_and_lists_only(tmp_path):
    config, tensors = qwen3()
    expert = "model.layers.{}.mlp.experts.{}.{}"
    down, up = expert.format(0, "{}", "down_proj"), expert.format(1, "{}", "up_proj")
    names, left = [down.format(7), down.format(1), up.format(4), "lm_head"], [down.format(3), up.format(1), "lm_head"]
    regex = r"re:.*layers\.0\.mlp\.experts\.7\..*"
    config |= {
        "num_local_experts": EXPERTS,
        "quantization_config": {
            "modules_to_not_convert": [*names, "model.layers.0.mlp.gate", regex],
            "ignore": [name.replace("model.", "language_model.model.", 1) for name in names],
            "config_groups": {"group_0": {"targets": [*names, "Linear"], "weights": {"num_bits": 8}}},
            "dynamic": {names[0]: {"bits": 8}, names[1]: {"bits": 4}, "+:.*": {"bits": 2}},
        },
        "note": "größe", "small": 1e-06, "whole": 10.0,
    }  # fmt: skip
    folder = write(tmp_path / "in", config, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=4, ensure_ascii=False))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"exclude_modules": names}}))
    prune(folder, PLAN, tmp_path / "out")

    text = (tmp_path / "out/config.json").read_text()
    want = json.loads(json.dumps(config)) | {"num_experts": 4, "num_local_experts": 4}
    want["quantization_config"] = {
        "modules_to_not_convert": [*left, "model.layers.0.mlp.gate", r"re:(?:.*\.)?layers\.0\.mlp\.experts\.3\..*"],
        "ignore": [name.replace("model.", "language_model.model.", 1) for name in left],
        "config_groups": {"group_0": {"targets": [*left, "Linear"], "weights": {"num_bits": 8}}},
        "dynamic": {left[0]: {"bits": 8}, "+:.*": {"bits": 2}},
    }
    assert text == json.dumps(want, indent=4, ensure_ascii=False)
    side = (tmp_path / "out/hf_quant_config.json").read_text()
    assert side == json.dumps({"quantization": {"exclude_modules": left}})
    assert verify(folder, PLAN, tmp_path / "out").problems == ()


@pytest.mark.parametrize(
    "text",
    ['{\n  "a": 8\n}\n', '{\n\t"a": 8\n}', '{"a":8}', '{"a": 8}\n', '{\n    "a": 8,\n    "b": "\\u00e9"\n}'],
)
def test_json_keeps_its_form(text):
    assert dumped_like(json.loads(text), text) == text
    assert dumped_like(json.loads(text) | {"a": 4}, text) == text.replace("8", "4")


@pytest.fixture
def nothing_written(tmp_path: Path) -> Iterator[None]:
    """The test must leave no file behind beside those it made before."""
    yield
    assert not [path for path in tmp_path.iterdir() if "moekern" in path.name or path.name == "out"]


@pytest.mark.usefixtures("nothing_written")
class TestRefusals:
    def refused(self, source: Path, message: str, plan: Plan = PLAN, out: Path | None = None, **options: Any) -> None:
        with pytest.raises(InputError, match=message) as error:
            prune(source, plan, out or source.parent / "out", **options)
        assert "\n" not in str(error.value)

    def test_existing_output(self, source, tmp_path):
        (tmp_path / "there").mkdir()
        self.refused(source, "there: exists already", out=tmp_path / "there")
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        self.refused(source, "link: exists already", out=tmp_path / "link")
        self.refused(source, "--out /: names no new folder", out=Path("/"))
        self.refused(source, "--out .: names no new folder", out=Path())

    def test_output_inside_the_source(self, source):
        self.refused(source, "lies inside the source", out=source / "pruned")
        assert not (source / "pruned").exists()

    def test_a_file_where_a_folder_should_be(self, source, tmp_path):
        (tmp_path / "none").touch()
        self.refused(source, "none is no folder; name another place", out=tmp_path / "none" / "pruned")

    def test_unwritable_parent(self, source, tmp_path, monkeypatch):
        # root may write anywhere, so the answer of the system is replaced
        monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
        self.refused(source, "no permission to write in")

    def test_full_disk(self, source, monkeypatch):
        found = list(os.statvfs(source))
        found[4] = 1  # f_bavail
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(found))
        self.refused(source, r"needs [\d.]+ KiB, and .* has 4\.0 KiB free")

    def test_no_inodes(self, source, monkeypatch):
        found = list(os.statvfs(source))
        found[5:8] = 1000, 3, 3  # f_files, f_ffree, f_favail
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(found))
        self.refused(source, r"needs \d+ files, and .* has room for 3 \(inodes\)")

    def test_plans_that_do_not_fit(self, source):
        self.refused(source, "layer 1 is missing", plan_of({"0": (0, 1)}))
        self.refused(source, "range", plan_of({"0": (0, 8), "1": (0, 1)}))
        self.refused(source, "top_k", plan_of({"0": (0,), "1": (0,)}))
        self.refused(source, "another model", Plan(PLAN.layers, {"fingerprint": "0" * 64}))

    def test_unknown_mtp_mode(self, source):
        self.refused(source, "--mtp burn: expected one of prune, drop, keep", mtp="burn")

    def test_source_cut_short_while_it_is_read(self, source):
        last = sorted(source.glob("*.safetensors"))[-1]

        def cut_short(done: int, total: int) -> None:
            os.truncate(last, 2000)

        with pytest.raises(InputError, match=f"{last.name} in .* changed while it was copied; .* stay in"):
            prune(source, PLAN, source.parent / "out", progress=cut_short)
        shutil.rmtree(source.parent / "out.moekern")

    def test_source_gone_while_it_is_read(self, source):
        last = sorted(source.glob("*.safetensors"))[-1]
        with pytest.raises(
            InputError, match=f"{last}: No such file or directory; .*: run the same command again to go"
        ):
            prune(source, PLAN, source.parent / "out", progress=lambda done, total: last.unlink(missing_ok=True))
        shutil.rmtree(source.parent / "out.moekern")

    def test_no_space_while_writing(self, source):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        try:
            self.refused(source, "not finished: .*: File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_interruption(self, source, tmp_path, error):
        def interrupt(done: int, total: int) -> None:
            raise error

        with pytest.raises(error):
            prune(source, PLAN, tmp_path / "out", progress=interrupt)
