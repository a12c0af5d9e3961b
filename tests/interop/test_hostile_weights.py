"""Weight files of strangers: nothing is executed, and no claim in a file allocates memory."""

import io
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest

from imagen_jax.evaluation.features import frechet
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.interop import weights


def storage(count: bytes = b"K\x0c", key: bytes = b"0") -> bytes:
    return (
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + key + b"X\x03\0\0\0cpu" + count
    ) + b"tQ"


def state(
    shape: bytes = b"K\x03K\x04\x86", strides: bytes = b"K\x04K\x01\x86", before: bytes = b"", **kw
) -> bytes:
    """The pickle of {"w": tensor of 12 floats}, with the given parts."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(**kw) + b"K\0" + shape + strides
    tensor += b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02" + before + b"}(X\x01\0\0\0w" + tensor + b"u."


def archive(content: bytes, compression: int = zipfile.ZIP_STORED, data: bytes = b"") -> bytes:
    file = io.BytesIO()
    data = data or np.arange(12, dtype=np.float32).tobytes()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        zipped.writestr("archive/data.pkl", content)
        zipped.writestr("archive/data/0", data)
    return file.getvalue()


def stream(content: bytes) -> bytes:
    head = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00."
    keys = b"\x80\x02](X\x01\0\0\x000e."
    data = struct.pack("<q", 12) + np.arange(12, dtype=np.float32).tobytes()
    return head + content + keys + data


def read(tmp_path, data: bytes) -> dict:
    (tmp_path / "w.bin").write_bytes(data)
    return weights.read_torch(tmp_path / "w.bin")


@pytest.mark.parametrize("container", [archive, stream])
def test_the_valid_file(tmp_path, container):
    found = read(tmp_path, container(state()))
    np.testing.assert_array_equal(found["w"], np.arange(12.0).reshape(3, 4))


HUGE = b"\x8a\x06" + (10**12).to_bytes(6, "little")
PICKLES = {
    "a call": b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.",
    "a call by the older instruction": b"\x80\x02(X\x04\0\0\0trueios\nsystem\n.",
    "an object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "a memo of index 2**31": state(before=b"Nr\xff\xff\xff\x7f0"),
    "a memo of index 10**9 in text": state(before=b"Np1000000000\n0"),
    "bytes of 2**60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "text of 2**60": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "a frame of 2**60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    "a shape beyond the storage": state(shape=HUGE + b"K\x04\x86"),
    "a shape beyond the storage by strides of 0": state(HUGE + HUGE + b"\x86", b"K\0K\0\x86"),
    "a negative shape": state(shape=b"J\xff\xff\xff\xffK\x04\x86"),
    "a negative stride": state(strides=b"J\xff\xff\xff\xffK\x01\x86"),
    "more strides than axes": state(strides=b"K\x04K\x01K\x01\x87"),
    "a shape of text": state(shape=b"X\x01\0\0\0aK\x04\x86"),
    "a storage of 10**12": state(shape=HUGE + b"K\x01\x86", strides=b"K\0K\0\x86", count=HUGE),
    "no end": state()[:-1],
    "an extension": b"\x80\x02\x82\x01.",
    "a buffer outside": b"\x80\x05\x97.",
    "a reduction of a number": b"\x80\x02K\x01)R.",
    "nothing": b"",
}


@pytest.mark.parametrize("container", [archive, stream])
@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_refused(tmp_path, name, container):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(weights.WeightsError) as error:
        read(tmp_path, container(PICKLES[name]))
    assert "\n" not in str(error.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 << 10, f"{grown >> 10} MB"


def test_compressed_members_are_refused(tmp_path):
    zeros = b"\0" * (64 << 20)
    for data in (
        archive(state(), zipfile.ZIP_DEFLATED),
        archive(state(), zipfile.ZIP_DEFLATED, zeros),
        archive(state() + zeros, zipfile.ZIP_DEFLATED),
        archive(state(), zipfile.ZIP_LZMA),
    ):
        with pytest.raises(weights.WeightsError, match="compressed"):
            read(tmp_path, data)


def test_an_archive_that_claims_more_than_it_holds(tmp_path):
    data = bytearray(archive(state()))
    at = data.rindex(b"PK\x01\x02")  # The directory entry of data/0.
    data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    with pytest.raises(weights.WeightsError):
        read(tmp_path, bytes(data))


HEADERS = {
    "a header of 2**60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "a shape of 2**62": b'{"w":{"dtype":"F32","shape":[4611686018427387904],'
    b'"data_offsets":[0,48]}}',
    "a product that overflows": b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],'
    b'"data_offsets":[0,48]}}',
    "offsets that lead back": b'{"w":{"dtype":"F32","shape":[12],"data_offsets":[48,0]}}',
    "offsets beyond the file": b'{"w":{"dtype":"F32","shape":[24],"data_offsets":[0,96]}}',
    "overlapping tensors": b'{"v":{"dtype":"F32","shape":[12],"data_offsets":[0,48]},'
    b'"w":{"dtype":"F32","shape":[12],"data_offsets":[0,48]}}',
    "a negative shape": b'{"w":{"dtype":"F32","shape":[-12],"data_offsets":[0,48]}}',
    "an unknown dtype": b'{"w":{"dtype":"X9","shape":[12],"data_offsets":[0,48]}}',
    "nesting": b'{"w":' + b"[" * 100_000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_header_is_refused(tmp_path, name):
    header = HEADERS[name]
    if not header.startswith(b"{"):
        data = header
    else:
        data = struct.pack("<Q", len(header)) + header + b"\0" * 48
    (tmp_path / "w.safetensors").write_bytes(data)
    for call in (weights.read_safetensors, weights.open_safetensors):
        with pytest.raises(weights.WeightsError):
            call(tmp_path / "w.safetensors")


def npz(**arrays: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in arrays.items():
            zipped.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + content


STATISTICS = {
    "a shape of 10**12": npz(mu=npy("{'descr':'<f8','fortran_order':False,'shape':(10**12,)}")),
    "a shape of 10**11": npz(
        mu=npy("{'descr':'<f8','fortran_order':False,'shape':(100000000000,)}", b"\0" * 80)
    ),
    "two gigabytes of zeros": npz(
        mu=npy("{'descr':'<f8','fortran_order':False,'shape':(268435456,)}", b"\0" * (65 << 20))
    ),
    "a pickle": npz(mu=npy("{'descr':'|O','fortran_order':False,'shape':(1,)}", pickle.dumps(1))),
    "a header that is code": npz(mu=npy("__import__('os').system('true')")),
    "no arrays": npz(),
    "no zip": b"\x93NUMPY",
    "text": b"hello",
}


@pytest.mark.parametrize("name", STATISTICS)
def test_hostile_statistics_are_refused(tmp_path, name):
    (tmp_path / "x.npz").write_bytes(STATISTICS[name])
    with pytest.raises(EvaluationError, match="cannot read statistics") as error:
        frechet.load(tmp_path / "x.npz")
    assert "\n" not in str(error.value)
