"""No file can run code, hang the reader or exhaust memory."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN

import echo_eqx
from echo_eqx import EchoError
from echo_eqx.speech.speaker import speaker_latents
from echo_eqx.weights.safetensors_reader import SafetensorsFile

PTH = GOLDEN / "dacvae_tiny" / "weights.pth"


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def load_pickle(tmp_path: Path, data: bytes):
    path = tmp_path / "model.pkl"
    path.write_bytes(data)
    return echo_eqx.load_dit(path)


def code_runners(path: Path) -> dict[str, Call]:
    """Calls that would create a file, or worse."""
    return {
        "posix.system": Call(os.system, f"touch {path}"),
        "builtins.eval": Call(eval, f"open({str(path)!r}, 'w')"),
        "builtins.exec": Call(exec, f"open({str(path)!r}, 'w')"),
        "builtins.getattr": Call(getattr, Call(__import__, "os"), "system"),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(path)]),
        "numpy.load": Call(np.load, str(path), None, True),
        "builtins.open": Call(open, str(path), "w"),
        "_io.open_code": Call(io.open_code, str(path)),
        "functools.partial": Call(__import__("functools").partial, os.system, f"touch {path}"),
        "builtins.bytearray": Call(bytearray, 2**40),
    }


@pytest.mark.parametrize("name", list(code_runners(Path("x"))))
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["params", "opt_state", "leaf", "bare"])
def test_calls_are_rejected_by_name(tmp_path, name, protocol, place):
    mark = tmp_path / "mark"
    call = code_runners(mark)[name]
    content = {
        "params": {"params": call, "step": 0},
        "opt_state": {"params": {}, "opt_state": [call]},
        "leaf": {"params": {"in_proj": {"kernel": call}}},
        "bare": call,
    }[place]
    with pytest.raises(EchoError, match=r"it names '[\w.]+', which is refused") as caught:
        load_pickle(tmp_path, pickle.dumps(content, protocol=protocol))
    # For these the arguments are refused first, or the function has another name.
    last = name.rpartition(".")[2]
    assert name in ("builtins.getattr", "subprocess.Popen") or last in str(caught.value)
    assert not mark.exists()


def test_a_call_hidden_in_a_torch_file_is_rejected(tmp_path):
    mark = tmp_path / "mark"
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", pickle.dumps(Call(os.system, f"touch {mark}"), 2))
    with pytest.raises(EchoError, match=r"posix\.system.*refused"):
        echo_eqx.load_codec(path)
    assert not mark.exists()


def test_known_classes_cannot_be_called_with_other_arguments(tmp_path):
    for data in (
        b"\x80\x04cnumpy\nndarray\n(K\x05tR.",  # numpy.ndarray(5)
        b"\x80\x04cml_dtypes\nbfloat16\n)R.",
        b"\x80\x04cnumpy\ndtype\n(X\x01\x00\x00\x00OK\x00K\x01tR.",  # objects
        b"\x80\x04ccollections\nOrderedDict\n(K\x05tR.",
        b"\x80\x04c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.",
    ):
        with pytest.raises(EchoError, match=r"model\.pkl"):
            load_pickle(tmp_path, data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04i" + b"os\nsystem\n.",  # INST
        b"\x80\x04(cos\nsystem\no.",  # OBJ
        b"\x80\x02\x82\x01.",  # EXT1: the extension registry
        b"\x80\x04Pid\n.",  # PERSID
        b"\x80\x04K\x01Q.",  # BINPERSID
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"\x80\x04}\x8f.",  # EMPTY_SET
    ],
)
def test_other_opcodes_are_rejected(tmp_path, data):
    with pytest.raises(EchoError, match=r"model\.pkl"):
        load_pickle(tmp_path, data)


def text(string: str) -> bytes:
    """Pickle code for a string."""
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def bomb(levels: int, inner: bytes) -> bytes:
    """Pickle code for a tuple that holds one tuple twice, `levels` deep: 2^levels leaves."""
    return inner + b"".join(b"2\x86" for _ in range(levels))  # DUP, TUPLE2


BOMBS = {
    "as params": b"\x80\x04}X\x06\x00\x00\x00params" + bomb(60, b"K\x01") + b"s.",
    "as a key": b"\x80\x04}" + bomb(60, b"K\x01") + b"K\x01s.",
    "as optimizer state": b"\x80\x04}(X\x06\x00\x00\x00params}X\x09\x00\x00\x00opt_state"
    + bomb(60, b"K\x01")
    + b"u.",
    "as a dtype": b"\x80\x04cnumpy\ndtype\n" + bomb(60, b"K\x01") + b"\x85R.",
    "as a shape": b"\x80\x04cnumpy._core.multiarray\n_reconstruct\n)R(K\x01"
    + bomb(60, b"K\x01")
    + b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89C\x04aaaatb.",
    "in an ordered dict": b"\x80\x04ccollections\nOrderedDict\n]"
    + bomb(60, b"K\x01")
    + b"K\x01\x86a\x85R.",
    "huge memo index": b"\x80\x04K\x01r\xff\xff\xff\x7f.",
    "huge string": b"\x80\x04X\xff\xff\xff\x7fabc.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"N.",
    "huge integer": b"\x80\x04\x8b" + struct.pack("<i", 10_000) + b"\x7f" * 10_000 + b".",
    "digits": b"\x80\x04I" + b"9" * 900 + b"\n.",
    "negative length": b"\x80\x04T" + struct.pack("<i", -5) + b"abc.",
    "empty stack": b"\x80\x04\x87.",
    "no mark": b"\x80\x04K\x01t.",
    "get without put": b"\x80\x04h\x05.",
    "deep lists": b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "deep params": b"\x80\x04}X\x06\x00\x00\x00params"
    + b"}X\x01\x00\x00\x00a" * 100_000
    + b"}"
    + b"s" * 100_000
    + b"s.",
}


def copies() -> bytes:
    """A pickle that contains a string of 1 MB once and has it encoded 10,000 times."""
    held = text("a" * 10**6) + b"\x94"
    call = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    return b"\x80\x04" + held + b"0](" + call * 10_000 + b"e."


BOMBS |= {
    "copies of a string": copies(),
    "long names": b"\x80\x04}X\x06\x00\x00\x00params}X"
    + struct.pack("<I", 10**6)
    + b"a" * 10**6
    + b"}ss.",
    "millions of empty lists": b"\x80\x04(" + b"]" * 30_000_000 + b"l.",
    "keys that hash alike": b"\x80\x04}("
    + b"".join(
        b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"K\x01" for k in range(20_000)
    )
    + b"u.",
}


def array_pickle(shape: tuple, data: bytes) -> bytes:
    shape_code = b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in shape) + b"t"
    return (
        b"\x80\x04}X\x06\x00\x00\x00params}X\x01\x00\x00\x00w"
        b"cnumpy._core.multiarray\n_reconstruct\n)R(K\x01"
        + shape_code
        + b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89C"
        + bytes([len(data)])
        + data
        + b"tbss."
    )


@pytest.mark.parametrize(
    "shape", [(2**40,), (2**31, 2**31), (-1,), (2**62, 4), (3,), (1,) * 40], ids=str
)
def test_absurd_shapes_are_rejected(tmp_path, shape):
    with pytest.raises(EchoError, match="array"):
        load_pickle(tmp_path, array_pickle(shape, b"\x00" * 4))


def rewritten(tmp_path: Path, change) -> Path:
    """The golden weights.pth with changed entries."""
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(PTH) as old, zipfile.ZipFile(path, "w") as new:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
        for name, data in change(entries).items():
            new.writestr(name, data)
    return path


def test_storages_of_the_wrong_size_are_rejected(tmp_path):
    def shorter(entries):
        return {
            name: data[:-4] if name.endswith("/data/7") else data for name, data in entries.items()
        }

    with pytest.raises(EchoError, match="storage 7 has"):
        echo_eqx.load_codec(rewritten(tmp_path, shorter))

    def absent(entries):
        return {name: data for name, data in entries.items() if not name.endswith("/data/7")}

    with pytest.raises(EchoError, match="storage '7' is missing"):
        echo_eqx.load_codec(rewritten(tmp_path, absent))


def test_compressed_and_overlapping_entries_are_rejected(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data.pkl", b"\x80\x02N.")
        archive.writestr("weights/data/0", bytes(10**8))
    with pytest.raises(EchoError, match=r"larger than the file|compressed"):
        echo_eqx.load_codec(path)


def test_a_flipped_bit_in_a_torch_file_is_detected(tmp_path):
    data = bytearray(PTH.read_bytes())
    with zipfile.ZipFile(PTH) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[entry.header_offset + 200 + entry.file_size // 2] ^= 1
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(EchoError, match="damaged"):
        echo_eqx.load_codec(path)


def test_tensors_reaching_beyond_their_storage_are_rejected(tmp_path):
    def change(entries):
        # The first tensor's size (5,) becomes (6,): BININT1 5 in a tuple of one.
        name = next(name for name in entries if name.endswith("data.pkl"))
        data = entries[name]
        assert b"K\x05\x85" in data
        return entries | {name: data.replace(b"K\x05\x85", b"K\x06\x85", 1)}

    with pytest.raises(EchoError, match="beyond its storage"):
        echo_eqx.load_codec(rewritten(tmp_path, change))


def test_nested_metadata_in_a_torch_file_is_handled_quickly(tmp_path):
    data = (
        b"\x80\x02}(X\x0a\x00\x00\x00state_dict}X\x08\x00\x00\x00metadata}X\x06\x00\x00\x00kwargs"
    )
    data += b"}X\x0b\x00\x00\x00encoder_dim" + bomb(60, b"K\x01") + b"ssu."
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", data)
    with pytest.raises(EchoError, match="encoder_dim: expected a whole number, got a tuple"):
        echo_eqx.load_codec(path)


@pytest.mark.parametrize(
    "args",
    [
        b"K\x00K\x01\x85",  # no stride
        b"K\x00K\x01K\x02\x86K\x01\x85\x89",  # size and stride of different length
        b"K\x00K\x00\x85\x8a\x0d" + (2**100).to_bytes(13, "little") + b"\x85\x89",
        b"K\x00NN\x89",
    ],
)
def test_damaged_tensor_records_are_rejected_by_name(tmp_path, args):
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ"
    )
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + args + b"tR"
    data = b"\x80\x02}" + text("state_dict") + b"}" + text("w") + tensor + b"ss."
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", data)
        archive.writestr("weights/data/0", bytes(4))
    with pytest.raises(EchoError, match=r"weights\.pth: w"):
        echo_eqx.load_codec(path)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"{[1]: 2}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 128)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 128)}" % 2**70,
        b"-" * 9000,
    ],
)
def test_damaged_headers_of_latents_are_rejected_by_name(
    tmp_path, golden_dit, golden_codec, header
):
    path = tmp_path / "voice.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n")
    with pytest.raises(EchoError, match=r"voice\.npy"):
        speaker_latents(golden_dit, golden_codec, path)


def test_reference_latents_with_pickled_objects_are_rejected(tmp_path, golden_dit, golden_codec):
    mark = tmp_path / "mark"
    path = tmp_path / "voice.npy"
    np.save(path, np.array([Call(os.system, f"touch {mark}")], object), allow_pickle=True)
    with pytest.raises(EchoError, match=r"voice\.npy"):
        speaker_latents(golden_dit, golden_codec, path)
    np.savez(tmp_path / "voice", a=np.zeros(3))
    (tmp_path / "voice.npz").replace(path)
    with pytest.raises(EchoError, match="expected latents"):
        speaker_latents(golden_dit, golden_codec, path)
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 128), }"
    path.write_bytes(header + text.ljust(117) + b"\n" + bytes(16))
    with pytest.raises(EchoError, match=r"voice\.npy"):
        speaker_latents(golden_dit, golden_codec, path)


def test_random_damage_raises_nothing_but_our_errors(tmp_path):
    rng = np.random.default_rng(0)
    source = (GOLDEN / "dit_tiny" / "weights_only.pkl").read_bytes()
    # The structure is in the first bytes and between the arrays; arrays make up the rest.
    for round_ in range(60):
        data = bytearray(source)
        for position in rng.integers(0, 3000 if round_ % 2 else len(data), 5):
            data[position] = rng.integers(0, 256)
        try:
            load_pickle(tmp_path, bytes(data))
        except EchoError:
            pass


def test_bombs_are_rejected_within_time_and_memory_limits(tmp_path):
    # In a process of its own with 1 GiB more than the imports take.
    bombs = {**BOMBS, "absurd shape": array_pickle((2**40,), b"\x00" * 4)}
    for name, data in bombs.items():
        (tmp_path / f"{name}.pkl").write_bytes(data)
    script = f"""
import resource
from pathlib import Path
import psutil
import echo_eqx
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        echo_eqx.load_dit(path)
    except echo_eqx.EchoError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sentences = done.stdout.splitlines()
    assert len(sentences) == len(bombs)
    for name, sentence in zip(sorted(bombs), sentences, strict=True):
        assert f"{name}.pkl" in sentence and len(sentence) < 1000


HEADER = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def safetensors(path: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "header, reason",
    [
        (b"[" * 50_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b"[" + b"[]," * 2_100_000, "expected JSON of at most"),
        ({"w": HEADER["w"] | {"shape": [2**62, 0]}}, "shape"),
        ({"w": HEADER["w"] | {"shape": [-2, -1]}}, "shape"),
        ({"w": HEADER["w"] | {"shape": [3]}}, "expected 12 bytes, got 8"),
        ({"w": HEADER["w"] | {"data_offsets": [8, 16]}}, "start"),
        ({"w": HEADER["w"] | {"data_offsets": [-8, 0]}}, "expected two data_offsets"),
        ({"w": HEADER["w"] | {"dtype": "F32 "}}, "got 'F32 '"),
        ({"w": HEADER["w"] | {"dtype": ["F32"]}}, "got 'list'"),
        ({"w": HEADER["w"], "v": HEADER["w"]}, "start"),
        (b'{"w":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', "duplicate name"),
        ({"__metadata__": {"a": 1}, **HEADER}, "metadata"),
        (b'{"w":1e999}', "too large"),
        (b"\xff\xfe{}", "not a readable"),
    ],
    ids=str,
)
def test_absurd_safetensors_headers_are_rejected_by_name(tmp_path, header, reason):
    path = safetensors(tmp_path / "model.safetensors", header)
    with pytest.raises(EchoError, match=rf"model\.safetensors .*{reason}"):
        SafetensorsFile(path)


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for length in (100, 2**40, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(EchoError, match=r"model\.safetensors .*header has"):
            SafetensorsFile(path)


@pytest.mark.parametrize(
    "change",
    [
        {"watermark": {"num_lstm_layers": 2**24 - 1, "strides": [2], "dim": 2}},
        {"hidden_dim": 2**24 - 1},
        {"encoder_rates": [2**20], "decoder_rates": [2**20]},
        {"sample_rate": 2**24 - 1},
    ],
)
def test_a_config_that_contradicts_its_tensors_is_rejected_first(tmp_path, change):
    config = {"encoder_rates": [2], "decoder_rates": [2], "watermark": None, **change}
    metadata = {"format": "echo_eqx", "kind": "codec", "config": json.dumps(config)}
    path = safetensors(tmp_path / "codec.safetensors", {"__metadata__": metadata, **HEADER})
    started = time.process_time()
    with pytest.raises(EchoError, match=r"codec\.safetensors"):
        echo_eqx.load_codec(path)
    assert time.process_time() - started < 2


def test_zips_with_odd_records_are_rejected_by_name(tmp_path):
    path = tmp_path / "weights.pth"
    whole = PTH.read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 0, 2)  # the end lies on a second disk
    record = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    many = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 9, 9, 2**31, 0, 0)
    large = whole[: whole.rindex(b"PK\x06\x06")] + many  # without torch's own zip64 record
    for data in (*(whole[:end] + tail for tail in (locator + record, b"", locator)), large):
        path.write_bytes(data)
        with pytest.raises(EchoError, match=r"weights\.pth"):
            echo_eqx.load_codec(path)


def test_nothing_in_the_package_unpickles():
    package = Path(echo_eqx.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert "pickle.load" not in text and "Unpickler" not in text, path
        assert "allow_pickle=True" not in text, path
