"""Pushing shards to the Hub: a real server on loopback implements what is used of its protocol."""

import json
import logging
import os
import time
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Hub
from processes import run_source
from shards import make_dataset, sha256

from echo_eqx.errors import EchoError
from echo_eqx.prepare import push as push_module
from echo_eqx.prepare.push import push

REPO = "owner/voice"
CODEC = {"id": "dacvae-tiny", "sample_rate": 48000, "hop": 1920, "latent_dim": 8}


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that `push` would have slept."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five shards, indexed by two machines, and the files next to them."""
    folder = make_dataset(tmp_path / "shards", shards=5, per_shard=3)
    write_index(folder, "index-0.json", range(3))
    write_index(folder, "index-1.json", range(3, 5))
    (folder / "silence.safetensors").write_bytes(b"silence")
    (folder / "codec.json").write_text(json.dumps(CODEC))
    (folder / "more").mkdir()
    (folder / "more" / "deeper.tar").write_bytes(b"ignored")
    (folder / "linked.tar").symlink_to(folder / "00000.tar")
    (folder / "report.html").write_text("ignored")
    return folder


def write_index(folder: Path, name: str, numbers, **fields: object) -> None:
    names = [f"{number:05d}.tar" for number in numbers]
    frames = round(2400.0 * CODEC["sample_rate"] / CODEC["hop"])
    shards = {
        name: {"sha256": sha256(folder / name), "samples": 3, "frames": frames} for name in names
    }
    index = {"format": "echo_eqx", "kind": "shards", "shards": shards, "codec": CODEC, **fields}
    (folder / name).write_text(json.dumps(index))


@pytest.fixture
def pushed(caplog):
    """Push, and return what is logged."""

    def pushed(folder: Path, repo: str = REPO) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "echo_eqx"):
            push(folder, repo)
        return caplog.messages

    return pushed


def refused(folder: Path, repo: str = REPO) -> str:
    with pytest.raises(EchoError) as caught:
        push(folder, repo)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 500
    return message


def in_process(hub: Hub, folder: Path, repo: str, **environment: str) -> list[str]:
    """The output of a new process whose environment points to this Hub."""
    script = """
import logging
import sys
from pathlib import Path
from echo_eqx.errors import EchoError
from echo_eqx.prepare.push import push
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING)
logging.getLogger("echo_eqx").setLevel(logging.INFO)
try:
    push(Path(sys.argv[1]), sys.argv[2])
except EchoError as error:
    print(error)
"""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    done = run_source(script, folder, repo, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_everything_is_uploaded_and_the_card_comes_last(hub, folder):
    lines = in_process(hub, folder, REPO, HF_TOKEN="hf_right")
    beside = ["codec.json", "index-0.json", "index-1.json", "silence.safetensors"]
    shards = [f"{number:05d}.tar" for number in range(5)]
    assert hub.commits == [*([shard] for shard in shards), [*beside, "README.md"]]
    files = hub.repos[REPO]
    assert set(files) == {".gitattributes", "README.md", *beside, *shards}
    for name in (*beside, *shards):
        assert files[name] == (folder / name).read_bytes(), name
    assert hub.private[REPO] and "private" in lines[0]
    assert lines[1] == "00000.tar sent (1 of 5)" and len(lines) == 7


def test_the_card_describes_the_dataset(hub, folder, pushed):
    write_index(folder, "index-all.json", range(5))
    pushed(folder)
    card = hub.repos[REPO]["README.md"].decode()
    header = huggingface_hub.DatasetCard(card).data.to_dict()
    assert header["license"] == "other" and header["task_categories"] == ["text-to-speech"]
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": "*.tar"}]
    for words in (
        "3.33 hours",
        "15 samples in 5 WebDataset shards",
        "float16 (frames, 8), 25 frames a second",
        "`dacvae-tiny`: 48,000 Hz",
        "echo-eqx train --data hf://datasets/owner/voice\n",
    ):
        assert words in card, words


def test_held_out_shards_and_clip_lists_are_uploaded(hub, folder, pushed):
    make_dataset(folder / "holdout", shards=1, per_shard=2, seed=1)
    write_index(folder / "holdout", "index-0.json", range(1))
    for name in ("clips-000.json", "holdout/clips-000.json"):
        (folder / name).write_text(name)
    pushed(folder)
    assert hub.commits[5] == ["holdout/00000.tar"] and len(hub.commits) == 7
    files = hub.repos[REPO]
    for name in ("clips-000.json", *(f"holdout/{x}.json" for x in ("index-0", "clips-000"))):
        assert files[name] == (folder / name).read_bytes(), name
    assert "15 samples in 5 WebDataset shards" in files["README.md"].decode()
    assert "`holdout/` holds 3 more samples" in files["README.md"].decode()
    hub.requests.clear()
    pushed(folder)
    assert sorted(hub.requests) == ["info", "resolve", "tree"]


def test_many_shards_share_commits(hub, folder, pushed, monkeypatch):
    monkeypatch.setattr(push_module, "MAX_COMMITS", 2)
    pushed(folder)
    names = [f"{n:05d}.tar" for n in range(5)]
    assert hub.commits[:-1] == [names[:3], names[3:]]


def test_pushing_again_sends_nothing(hub, folder, pushed):
    pushed(folder)
    hub.requests.clear()
    assert pushed(folder) == [f"{n:05d}.tar is already there ({n + 1} of 5)" for n in range(5)]
    assert sorted(hub.requests) == ["info", "resolve", "tree"]


def test_only_new_shards_and_their_index_are_sent(hub, folder, pushed):
    pushed(folder)
    hub.commits.clear()
    (folder / "00005.tar").write_bytes((folder / "00000.tar").read_bytes() + bytes(512))
    write_index(folder, "index-1.json", range(3, 6))
    pushed(folder)
    assert hub.commits == [["00005.tar"], ["index-1.json", "README.md"]]
    assert b"18 samples in 6" in hub.repos[REPO]["README.md"]


def test_an_interrupted_push_is_resumed(hub, folder, waits, pushed):
    hub.commits_to_live = 2
    assert "the Hub cannot be reached" in refused(folder)
    assert set(hub.repos[REPO]) == {".gitattributes", "00000.tar", "00001.tar"}
    hub.commits_to_live = 1_000_000
    hub.put.clear()
    hub.start()
    lines = pushed(folder)
    assert [line.split()[1] for line in lines[:5]] == ["is", "is", "sent", "sent", "sent"]
    sizes = [(folder / f"{n:05d}.tar").stat().st_size for n in (2, 3, 4)]
    assert hub.put == [*sizes, len(b"silence")]
    assert set(hub.repos[REPO]) > {"index-0.json", "README.md", "00004.tar"}


def test_transient_failures_are_retried(hub, folder, waits, pushed):
    kinds = "info create tree preupload batch put verify validate commit commit resolve".split()
    hub.faults = [(kind, 503) for kind in kinds] + [("commit", 429), ("commit", 412)]
    lines = pushed(folder)
    assert hub.faults == [] and len(hub.commits) == 6
    assert len([line for line in lines if "the Hub answered 503" in line]) == 5
    waited = "cannot push to owner/voice: the Hub answered 429 (as the test wants)"
    assert f"{waited}; trying again in 7 s" in lines
    assert len(hub.put) == 6, "a commit that is tried again sends no shard again"
    assert len(waits) == 13 and 7.0 in waits


def test_permanent_failures_are_not_retried(hub, folder, waits):
    hub.faults = [("commit", 500)] * 9
    assert refused(folder) == (
        "cannot push to owner/voice: the Hub answered 500 (as the test wants)"
    )
    assert hub.requests.count("commit") == 5 and sum(waits) == 15
    hub.faults = [("commit", 400)]
    hub.requests.clear()
    assert "the Hub answered 400" in refused(folder)
    assert hub.requests.count("commit") == 1
    hub.faults = [("put", 422)]
    hub.blobs.clear()
    assert "the Hub answered 422" in refused(folder)


def test_a_shard_that_differs_from_its_index_is_rejected(hub, folder):
    shard = folder / "00002.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    message = refused(folder)
    assert str(shard) in message and sha256(shard) in message
    assert set(hub.repos[REPO]) == {".gitattributes", "00000.tar", "00001.tar"}
    write_index(folder, "index-0.json", range(2))
    assert refused(folder) == f"{shard} is in no index*.json; move it away or list it"


def test_users_card_is_kept(hub, folder, pushed):
    pushed(folder)
    mine = "---\nlicense: cc0-1.0\n---\r\n# My voice\n\nRecorded in größer rooms."
    hub.repos[REPO]["README.md"] = mine.encode()
    pushed(folder)
    card = hub.repos[REPO]["README.md"].decode()
    assert card.startswith(mine + "\n\n<!-- echo_eqx:begin -->\n") and "3.33 hours" in card
    edited = card.replace("3.33 hours", "9 hours") + "\nThanks.\n"
    hub.repos[REPO]["README.md"] = edited.encode()
    pushed(folder)
    assert hub.repos[REPO]["README.md"].decode() == card + "\nThanks.\n"


def test_stray_markers_delete_no_text(hub, folder, pushed):
    pushed(folder)
    mine = "Not <!-- echo_eqx:end --> a <!-- echo_eqx:begin --> block.\n"
    hub.repos[REPO]["README.md"] = mine.encode()
    for _ in range(2):
        write_index(folder, "index-0.json", range(3), codec={**CODEC, "id": "other"})
        write_index(folder, "index-1.json", range(3, 5), codec={**CODEC, "id": "other"})
        pushed(folder)
        card = hub.repos[REPO]["README.md"].decode()
        assert card.startswith(mine) and card.count("<!-- echo_eqx:end -->") == 2
        assert "`other`" in card


def test_an_existing_dataset_keeps_its_visibility(hub, folder, pushed):
    hub.repos[REPO] = {}
    lines = pushed(folder)
    assert "create" not in hub.requests and not any("private" in line for line in lines)


def test_missing_permissions_are_explained(hub, folder):
    (unknown,) = in_process(hub, folder, REPO)
    assert "answered 401" in unknown and "hf auth login" in unknown
    hub.faults = [("create", 403)]
    assert "answered 403" in refused(folder)
    assert hub.commits == [] and hub.put == []


def test_no_network_gives_a_one_line_error(hub, folder, waits, monkeypatch):
    hub.stop()
    assert "the Hub cannot be reached" in refused(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(folder)
    hub.start()


@pytest.mark.parametrize("repo", ["voice", "a/b/c", "owner/", "/voice", "owner/my voice", ""])
def test_bad_names_are_rejected(folder, repo):
    assert refused(folder, repo).startswith("--push: expected owner/name of a dataset on the Hub")


def test_folders_with_nothing_to_push_are_rejected(folder, tmp_path):
    assert "cannot be read" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "expected at least one shard (*.tar)" in refused(tmp_path / "empty")
    write_index(folder, "index-2.json", range(2, 3))
    index = json.loads((folder / "index-2.json").read_text())
    index["shards"]["00002.tar"]["sha256"] = 64 * "0"
    (folder / "index-2.json").write_text(json.dumps(index))
    assert "00002.tar: two index*.json list it with different SHA-256" in refused(folder)
    (folder / "index-2.json").unlink()
    write_index(folder, "index-1.json", range(3, 5), codec={**CODEC, "id": "other"})
    assert "index-0.json names dacvae-tiny and index-1.json names other" in refused(folder)
    write_index(folder, "index-1.json", range(3, 5))
    (folder / "00004.tar").unlink()
    assert "00004.tar does not exist" in refused(folder)
    for text in ("", "[]", "{}", '{"format": "echo_eqx", "kind": "shards"}', '{"format": 1}'):
        (folder / "index-1.json").write_text(text)
        assert "index-1.json: expected an index of shards: " in refused(folder)
    (folder / "index-0.json").unlink()
    (folder / "index-1.json").unlink()
    assert "expected an index*.json" in refused(folder)
