"""A library: what is taken in, found again, checked again and removed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from lr_ray.cli.main import app
from typer.testing import CliRunner

from lr_ray.errors import AdapterError, StorageError
from lr_ray.library import index
from lr_ray.library.add import add_sources, check_library
from lr_ray.library.checks import failure_of
from lr_ray.library.formats import adapter_id_of
from lr_ray.library.index import Entry, checks_of, find_entry, list_entries, remove_entry
from lr_ray.library.market import DAMAGES, FORMATS
from lr_ray.storage.adapters import list_adapters, read_adapter, with_digest, write_adapter
from lr_ray.storage.filesystem import list_files, read_bytes
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter, as_tuned, merged
from lr_ray.vit.tokens import encode
from tests.library.conftest import TINY

Share = Callable[..., str]
Make = Callable[..., Adapter]


@pytest.fixture
def library(tmp_path: Path) -> str:
    return str(tmp_path / "library")


def logits(adapter: Adapter, backbone: Backbone) -> torch.Tensor:
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = as_tuned(adapter, backbone)
    with torch.no_grad(), merged(backbone.model, adapter.updates()):
        return adapter.logits(encode(backbone.model, seen.normalize(pixels), pool=adapter.pool).features)


@pytest.mark.parametrize("format_", FORMATS)
def test_an_adapter_of_every_format_is_the_same_function(vit: Backbone, make: Make, share: Share, library: str, format_: str):
    added = add_sources(library, [share(3, format_=format_)], TINY)
    assert (len(added.taken), added.refused) == (1, [])
    (folder,) = list_adapters(added.root)
    found, expected = read_adapter(folder), make(3)
    assert (logits(replace(expected, modules={}), vit) - logits(expected, vit)).abs().max() > 0.1
    tolerance = 2e-2 if format_ == "archive" else 1e-4  # which is in half precision
    torch.testing.assert_close(logits(found, vit), logits(expected, vit), rtol=0, atol=tolerance)
    assert found.spec.backbone_digest == vit.digest
    assert (found.spec.class_names[0] == "Vogel № 0") == (format_ != "kohya")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_and_leaves_nothing(share: Share, library: str, damage: str):
    reasons = {
        "cut off": "no whole safetensors file",
        "untrained": "trained: every lora_B is zero",
        "NaN": "fits: has NaN or infinite weights",
        "pickle": "a pickle can run any code",
        "another backbone": "fits: blocks.0.attn.qkv is 576×200, but (576, 192)",
    }
    added = add_sources(library, [share(0, damage=damage)], TINY)
    assert added.taken == []
    assert len(added.refused) == 1
    assert reasons[damage] in added.refused[0]
    assert "\n" not in added.refused[0]
    assert list_entries(library) == []


def test_adding_again_changes_nothing(share: Share, library: str, tmp_path: Path):
    for seed in range(3):
        share(seed)
    first = add_sources(library, [str(tmp_path / "market")], TINY)
    before = {name: read_bytes(f"{library}/{name}") for name in list_files(library, suffix="")}
    again = add_sources(library, [str(tmp_path / "market")], TINY)
    assert (len(first.taken), again.taken, again.present) == (3, [], first.taken)
    after = {name: read_bytes(f"{library}/{name}") for name in list_files(library, suffix="")}
    after.pop("index.parquet")
    before.pop("index.parquet", None)
    assert after == before


def test_a_librarys_own_folder_is_there_already(share: Share, library: str):
    first = add_sources(library, [share(0), share(1, format_="kohya")], TINY)
    assert sorted(add_sources(library, [first.root], TINY).present) == sorted(first.taken)
    assert len(list_entries(library)) == 2


def test_classes_without_names_are_those_of_one_adapter(share: Share, library: str, tmp_path: Path):
    for seed, folder in enumerate(("one", "other")):
        source = Path(share(seed, folder=folder))
        (source / "config.json").write_text(json.dumps({"id2label": {str(index): f"LABEL_{index}" for index in range(3)}}))
        source.rename(source.parent / "checkpoint-500")
    root = add_sources(library, [str(tmp_path / "one"), str(tmp_path / "other")], TINY).root
    names = [name for folder in list_adapters(root) for name in read_adapter(folder).spec.class_names]
    assert len(set(names)) == 6
    assert all(name.startswith("checkpoint-500-") for name in names)


def test_names_of_other_classes_are_left_out(share: Share, library: str):
    source = Path(share(0))
    (source / "config.json").write_text(json.dumps({"id2label": {str(index): f"n{index}" for index in range(1000)}}))
    add_sources(library, [str(source)], TINY)
    (entry,) = list_entries(library)
    assert entry.num_classes == 3
    assert "id2label names 1000 classes and is left out: its head has 3" in entry.notes


def test_from_within_an_adapters_folder(share: Share, library: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(share(0))
    (taken,) = add_sources(library, ["."], TINY).taken
    assert taken.startswith("adapter-")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf://owner/cats@0123abc", "cats"),
        ("hf://owner/cats@main/sub/folder", "folder"),
        ("a/b.tar.gz!checkpoint-5", "checkpoint-5"),
        ("x/Größe ä.safetensors", "Gr-e"),
        ("..", "adapter"),
    ],
)
def test_the_id_begins_with_the_sources_last_part(source: str, name: str):
    assert adapter_id_of(source) == name


def test_what_was_cut_short_is_taken_the_next_time(share: Share, library: str, monkeypatch: pytest.MonkeyPatch):
    source = share(0)

    def die(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lr_ray.storage.adapters.peft_config", die)
        with pytest.raises(KeyboardInterrupt):
            add_sources(library, [source], TINY)
    assert list_entries(library) == []
    assert len(add_sources(library, [source], TINY).taken) == 1
    assert len(list_entries(library)) == 1


def test_an_entry_tells_what_the_weights_are(share: Share, library: str):
    source = share(5, rank=8, num_classes=4, format_="transformers 5, rsLoRA")
    (taken,) = add_sources(library, [source], TINY).taken
    (entry,) = list_entries(library)
    assert entry == find_entry(library, taken) == find_entry(library, taken[:25]) == find_entry(library, entry.name)
    assert (entry.adapter_id, entry.source, entry.format) == (taken, source, "lora")
    assert (entry.ranks, entry.targets, entry.num_classes) == ((8,), ("q", "v"), 4)
    assert entry.base_model == entry.backbone == TINY.name
    assert [row["verdict"] for row in checks_of(library, entry)] == ["passed"] * 6
    shown = CliRunner().invoke(app, ["library", "show", library, taken], catch_exceptions=False).stdout.splitlines()
    assert {"ranks: 8", "targets: q, v", "num_classes: 4", f"adapter_id: {taken}"} <= set(shown)
    assert sum(line.startswith("passed: ") for line in shown) == 6
    told = json.loads(CliRunner().invoke(app, ["library", "show", library, taken, "--json"], catch_exceptions=False).stdout)
    assert (told["adapter_id"], told["ranks"], told["checks"]) == (taken, [8], checks_of(library, entry))


def test_an_adapter_without_a_head_is_taken_and_said_to_be(vit: Backbone, without_head: Adapter, library: str, tmp_path: Path):
    write_adapter(folder := str(tmp_path / "theirs"), with_digest(without_head), inputs={}, facts={})
    add_sources(library, [folder], TINY)
    (entry,) = list_entries(library)
    assert entry.num_classes == 0
    assert any("no head: of use for averaging and merging, not for inversion" in note for note in entry.notes)


def test_a_near_duplicate_is_taken_and_said_to_be_one(make: Make, library: str, tmp_path: Path):
    for name, factor in (("one", 1.0), ("louder", 2.0)):
        adapter = make(0)
        modules = {module: replace(low, scale=factor * low.scale) for module, low in adapter.modules.items()}
        write_adapter(str(tmp_path / name), with_digest(replace(adapter, modules=modules)), inputs={}, facts={})
    added = add_sources(library, [str(tmp_path / "one"), str(tmp_path / "louder")], TINY)
    assert len(added.taken) == 2
    assert [note for entry in list_entries(library) for note in entry.notes if note.startswith("duplicate")] == [
        f"duplicate: its update is that of {added.taken[0]}"
    ]


def test_several_backbones_are_several_groups(share: Share, library: str):
    larger = TINY.model_copy(update={"image_px": 48})
    one, other = (add_sources(library, [share(0)], config).root for config in (TINY, larger))
    assert one != other
    assert [entry.group for entry in list_entries(library)] == [one.rsplit("/", 1)[-1], other.rsplit("/", 1)[-1]]
    assert len(list_adapters(one)) == 1
    with pytest.raises(AdapterError, match="2 adapters are called 'timm-0'"):
        find_entry(library, "timm-0")
    assert [failure_of(found.checks) for found in check_library(library)] == ["", ""]


def test_removing(share: Share, library: str, tmp_path: Path):
    for seed in range(2):
        share(seed)
    add_sources(library, [str(tmp_path / "market")], TINY)
    gone, kept = list_entries(library)
    done = CliRunner().invoke(app, ["library", "rm", library, gone.adapter_id], catch_exceptions=False)
    assert done.stdout == f"removed {gone.name}\n"
    assert list_entries(library) == [kept]
    assert not [name for name in list_files(library, suffix="") if gone.adapter_id in name]
    done = CliRunner().invoke(app, ["library", "rm", library, kept.name, kept.adapter_id], catch_exceptions=False)
    assert done.stdout == f"removed {kept.name}\n"


def test_an_empty_id_is_no_ones(share: Share, library: str):
    add_sources(library, [share(0)], TINY)
    with pytest.raises(AdapterError, match="an adapter's id, or how it begins, is needed, not ''"):
        find_entry(library, "")


def test_a_check_of_nothing_finds_nothing_good(library: str):
    with pytest.raises(AdapterError, match="it holds no adapters to check"):
        CliRunner().invoke(app, ["library", "check", library], catch_exceptions=False)


def test_a_source_that_cannot_be_read_leaves_the_others_their_turn(share: Share, library: str, tmp_path: Path):
    added = add_sources(library, [share(0), str(tmp_path / "nothing"), "s3:/bucket/x", share(1)], TINY)
    assert len(added.taken) == 2
    assert ["no such file" in added.refused[0], "a URI has two slashes, s3://" in added.refused[1]] == [True, True]


@pytest.mark.parametrize("name", ["", "nothing"])
def test_an_unknown_id_is_one_line(share: Share, library: str, name: str):
    with pytest.raises(AdapterError, match=r"no adapters are called 'nothing'; it holds 0: `lr-ray library ls`"):
        find_entry(library, "nothing")
    add_sources(library, [share(0)], TINY)
    if name:
        with pytest.raises(AdapterError, match="it holds 1, such as .*timm-0"):
            find_entry(library, name)


def test_a_library_that_may_only_be_read_is_listed(share: Share, library: str, monkeypatch: pytest.MonkeyPatch):
    add_sources(library, [share(0)], TINY)
    Path(library, "index.parquet").unlink(missing_ok=True)

    def refuse(uri: str, _table: object) -> None:
        raise StorageError(f"cannot write {uri}: Read-only file system")

    monkeypatch.setattr(index, "write_parquet", refuse)
    assert len(list_entries(library)) == 1


# Checked again


def test_a_stored_adapter_that_changed_is_found(share: Share, library: str, tmp_path: Path):
    for seed in range(3):
        share(seed)
    root = add_sources(library, [str(tmp_path / "market")], TINY).root
    folders = list_adapters(root)
    Path(folders[0], "adapter_model.safetensors").write_bytes(b"cut")
    shutil.copy(f"{folders[1]}/adapter_model.safetensors", f"{folders[2]}/adapter_model.safetensors")
    whys = [failure_of(found.checks) for found in check_library(library)]
    assert whys[0].startswith("readable: ")
    assert whys[1] == ""
    assert whys[2].startswith("digest: its weights changed since it was added")


# The index


def test_the_index_follows_what_is_there(share: Share, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for seed in range(3):
        share(seed)
    add_sources(library, [str(tmp_path / "market")], TINY)
    entries = list_entries(library)
    read = []
    row_of = index._row_of
    monkeypatch.setattr(index, "_row_of", lambda where, name: read.append(name) or row_of(where, name))
    assert list_entries(library) == entries
    assert read == []
    shutil.rmtree(f"{library}/{entries[0].name}")
    add_sources(library, [share(8, folder="more")], TINY)
    found = list_entries(library)
    assert len(found) == 3
    assert entries[0] not in found
    assert len(read) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "older"])
def test_an_index_that_is_damaged_or_of_another_version_is_made_again(share: Share, library: str, damage: str):
    add_sources(library, [share(0)], TINY)
    entries, path = list_entries(library), Path(library, "index.parquet")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:20])
    elif damage == "flipped":
        content = path.read_bytes()
        path.write_bytes(content[:60] + bytes(255 - byte for byte in content[60:90]) + content[90:])
    else:
        pq.write_table(pq.read_table(path).drop_columns(["license"]), path)
    assert list_entries(library) == entries
    assert pq.read_table(path).num_rows == 1


def test_a_folder_that_is_no_librarys_is_said_to_be(make: Make, library: str):
    write_adapter(f"{library}/group/adapter", with_digest(make()), inputs={}, facts={})
    with pytest.raises(StorageError, match="is not of a library"):
        list_entries(library)
    Path(library, "group/adapter/lr_ray.json").unlink()
    with pytest.raises(StorageError, match=r"has no lr_ray\.json; delete the folder"):
        list_entries(library)


def test_a_group_without_its_backbone_is_said_to_be(share: Share, library: str):
    root = add_sources(library, [share(0)], TINY).root
    Path(root, "group.json").write_text(json.dumps({"backbone": {"nam": "x"}}))
    with pytest.raises(StorageError, match=r"group\.json is damaged"):
        list(check_library(library))


def test_on_s3(share: Share, bucket: str):
    added = add_sources(f"{bucket}/library", [share(0), share(1, format_="kohya")], TINY)
    assert [entry.adapter_id for entry in list_entries(f"{bucket}/library")] == sorted(added.taken)
    assert [failure_of(found.checks) for found in check_library(f"{bucket}/library")] == ["", ""]
    entry: Entry = find_entry(f"{bucket}/library", "kohya")
    remove_entry(f"{bucket}/library", entry)
    assert len(list_entries(f"{bucket}/library")) == 1
