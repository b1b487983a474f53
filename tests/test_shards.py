"""Listing the shards of a source."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from processes import run_source
from shards import DataServer, make_dataset

from echo_eqx.data.shards import list_shards
from echo_eqx.errors import EchoError

LIST = """
import json, sys
from pathlib import Path
from echo_eqx.data.shards import list_shards
from echo_eqx.errors import EchoError
for source in sys.argv[2:]:
    try:
        found = list_shards(source, Path(sys.argv[1]))
        shards = [[s.name, s.size, s.url, s.sha256] for s in found.shards]
        print(json.dumps([found.revision, found.digest(), shards]))
    except EchoError as error:
        print(json.dumps(str(error)))
"""


def list_in_process(server: DataServer, cache: Path, *sources: str, **environment: str):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    done = run_source(LIST, cache, *sources, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def server(tmp_path):
    server = DataServer(tmp_path / "hub")
    yield server
    server.stop()


def test_folder_glob_and_file_name_the_same_shards(tmp_path):
    data = make_dataset(tmp_path / "data", shards=3, per_shard=1)
    make_dataset(data / "more", shards=2, per_shard=1)
    (data / "notes.txt").write_text("no shard")
    shutil.copy(data / "00000.tar", data / "._00000.tar")
    folder = list_shards(str(data), tmp_path)
    names = ["00000.tar", "00001.tar", "00002.tar", "more/00000.tar", "more/00001.tar"]
    assert [shard.name for shard in folder.shards] == names
    assert folder.revision is None
    assert [shard.path for shard in folder.shards] == [data / name for name in names]
    assert [shard.size for shard in folder.shards] == [(data / n).stat().st_size for n in names]
    assert list_shards(f"{data}/**/*.tar", tmp_path).shards == folder.shards
    some = list_shards(f"{data}/0000[12].*", tmp_path)
    assert [shard.name for shard in some.shards] == names[1:3]
    assert [s.name for s in list_shards(str(data / "00001.tar"), tmp_path).shards] == names[1:2]


def test_the_digest_does_not_depend_on_the_mount_point(tmp_path):
    data = make_dataset(tmp_path / "data", shards=3, per_shard=1)
    shutil.copytree(data, tmp_path / "elsewhere")
    digest = list_shards(str(data), tmp_path).digest()
    assert list_shards(str(tmp_path / "elsewhere"), tmp_path).digest() == digest
    with (data / "00001.tar").open("ab") as file:
        file.write(bytes(512))
    changed = list_shards(str(data), tmp_path).digest()
    (data / "00001.tar").rename(data / "00009.tar")
    assert len({digest, changed, list_shards(str(data), tmp_path).digest()}) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", "does not exist"),
        ("empty", "expected at least one shard, got no *.tar"),
        ("empty/*.tar", "expected at least one shard, got no *.tar"),
        ("a.txt", "expected a *.tar"),
        ("x" * 5000, "not a usable path"),
    ],
)
def test_sources_without_shards_are_rejected(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(EchoError) as caught:
        list_shards(str(tmp_path / source), tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_hub_is_listed_at_a_commit_and_cached_for_offline_use(tmp_path, server):
    data = make_dataset(server.root / "owner/voices", shards=2, per_shard=1)
    make_dataset(data / "train/en", shards=2, per_shard=1)
    (server.root / "owner/none").mkdir()
    cache = tmp_path / "cache"
    whole, below, pinned = "hf://datasets/owner/voices", "/train", "@v1"
    sources = [whole, whole + below, whole + pinned + below + "/"]
    everything, part, at = list_in_process(server, cache, *sources)
    commit = server.commit
    assert everything[0] == part[0] == commit
    names = ["00000.tar", "00001.tar", "train/en/00000.tar", "train/en/00001.tar"]
    assert [shard[0] for shard in everything[2]] == names
    assert [shard[0] for shard in part[2]] == names[2:] and at[2] == part[2]
    name, size, url, sha256 = part[2][0]
    assert size == (data / name).stat().st_size and len(sha256) == 64
    assert url == f"{server.url}/datasets/owner/voices/resolve/{commit}/{name}"

    offline = list_in_process(server, cache, *sources, HF_HUB_OFFLINE="1")
    assert offline == [everything, part, at]
    (message,) = list_in_process(server, cache, whole + "@main", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in message and "owner/voices@main" in message

    wrong = [
        "owner/none",
        "owner/gone",
        "owner/voices@v9",
        "owner/voices/dev",
        "voices",
        "a/b/../c",
    ]
    messages = list_in_process(server, cache, *(f"hf://datasets/{name}" for name in wrong))
    assert "expected at least one shard, got no *.tar" in messages[0]
    assert all(isinstance(m, str) and "\n" not in m for m in messages), messages
    assert all("cannot list" in m for m in messages[1:4]), messages
    assert "expected hf://datasets/owner/name" in messages[4]

    server.commit = "d" * 40  # main moves on, so the cached listing is outdated
    moved, at_commit = list_in_process(server, cache, whole, f"{whole}@{server.commit}")
    assert moved[0] == at_commit[0] == server.commit and moved[1] != everything[1]
    server.stop()
    assert list_in_process(server, cache, whole)[0] == moved


def test_a_name_is_found_in_both_unicode_spellings(tmp_path):
    for here, there in (("NFC", "NFD"), ("NFD", "NFC")):
        stored = tmp_path / here / unicodedata.normalize(here, "größer é")
        make_dataset(stored, shards=1, per_shard=1)
        asked = tmp_path / here / unicodedata.normalize(there, "größer é")
        assert list_shards(str(asked), tmp_path).shards[0].path == stored / "00000.tar"


def test_no_file_named_like_a_shard_is_ignored(tmp_path):
    data = make_dataset(tmp_path / "data", shards=1, per_shard=1)
    (data / "00000.tar").rename(data / "A.TAR")
    (data / "folder.tar").mkdir()
    assert [shard.name for shard in list_shards(str(data), tmp_path).shards] == ["A.TAR"]
    assert len(list_shards(str(data / "A.TAR"), tmp_path).shards) == 1
    (data / "gone.tar").symlink_to("nowhere.tar")
    with pytest.raises(EchoError, match=r"gone.tar: expected a file, got a broken link"):
        list_shards(str(data), tmp_path)
