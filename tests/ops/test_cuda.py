"""CUDA operators: how launches divide the work, and the kernels' results, on the CPU (through cuda_on_host.h) and on a
GPU if there is one. On a GPU, the other operator tests also run these kernels, as backend "preferred".
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_on_host import ROOT, TYPES, compile_for_host, no_extension, no_gpu, numbers, pointer

from slm_fast import ops
from slm_fast.ops import dispatch
from slm_fast.ops.multi_lora import multi_lora_


@no_extension
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 256, 65535])
@pytest.mark.parametrize(("features_in", "features_out"), [(8, 8), (768, 768), (4096, 11008), (1032, 4096), (520, 24)])
def test_decode_blocks_share_out_every_feature_once_in_whole_pieces(rows, features_in, features_out):
    from slm_fast import _C

    for processors in (1, 108, 132):
        spans_in, spans_out = _C.decode_cut(rows, features_in, features_out, processors)
        assert len(spans_in) == len(spans_out) in (1, 2, 4, 8)  # cluster sizes that every GPU allows
        assert len(spans_in) == 1 or rows * len(spans_in) < 4 * processors
        for spans, features in ((spans_in, features_in), (spans_out, features_out)):
            covered = [feature for begin, end in spans for feature in range(begin, end)]
            assert covered == list(range(features))
            assert all(begin % 8 == 0 for begin, _ in spans)


@no_extension
def test_decode_uses_the_whole_card_for_few_rows_and_one_block_a_row_for_many():
    from slm_fast import _C

    assert [len(_C.decode_cut(rows, 4096, 4096, 132)[0]) for rows in (1, 32, 64, 256, 512)] == [8, 8, 8, 2, 1]


@no_extension
@pytest.mark.parametrize("rank", [1, 16, 17, 32, 48, 64])
@pytest.mark.parametrize(("features_in", "features_out"), [(8, 8), (768, 768), (4096, 11008), (1032, 4096), (520, 24)])
def test_blocks_of_many_tokens_share_out_every_feature_once_and_fit_any_card(rank, features_in, features_out):
    from slm_fast import _C

    for processors, shared in ((132, 227 << 10), (84, 99 << 10)):
        for samples, tokens in ((1, 2), (64, 24), (8, 512), (256, 128), (5000, 33)):
            cut = _C.token_cut(samples, tokens, rank, features_in, features_out, processors, shared)
            tile, spans_in, spans_out, bytes_ = cut
            assert tile == (32 if tokens <= 32 else tile) in (32, 64)
            assert bytes_ <= shared
            assert len(spans_in) == len(spans_out) <= 2
            for spans, features in ((spans_in, features_in), (spans_out, features_out)):
                covered = [feature for begin, end in spans for feature in range(begin, end)]
                assert covered == list(range(-(-features // 64) * 64))  # whole tiles


@no_extension
def test_few_tokens_are_cut_small_so_that_all_multiprocessors_have_two_blocks():
    from slm_fast import _C

    shapes = ((8, 512, 32, 4096), (64, 24, 48, 768), (32, 512, 48, 1024), (256, 128, 48, 768), (52, 70, 16, 4096))
    cuts = [_C.token_cut(b, t, r, h, h, 132, 227 << 10) for b, t, r, h in shapes]
    assert [(tile, len(spans)) for tile, spans, _, _ in cuts] == [(32, 2), (32, 2), (64, 1), (64, 1), (32, 2)]


def test_cuda_kernels_beside_a_torch_without_cuda_are_not_usable_and_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "NATIVE_MISSING", None)
    monkeypatch.setattr(dispatch, "import_module", lambda _: SimpleNamespace(build_info=lambda: {"cuda": "nvcc 13.0"}))
    monkeypatch.setattr("torch.version.cuda", None)
    assert "this torch was built without CUDA" in dispatch._find_cuda()
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert dispatch._find_cuda() is None


LOOK_UP = """
#include <cuda/torch_cuda.h>
#include <iostream>
int main(int, char** arguments) {
  if (arguments[1]) dlopen(arguments[1], RTLD_NOW);
  try { std::cout << reinterpret_cast<intptr_t>(slm_fast::cuda::current_stream(3)); }
  catch (const std::exception& error) { std::cout << error.what(); }
}
"""
STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream)'
LIBTORCH_CUDA = {
    "found": (f"{STREAM} {{ *stream = reinterpret_cast<void*>(device + 4096L); return 0; }}", "4099"),
    "refused": (f"{STREAM} {{ return 1; }}", "slm_fast: torch has no CUDA stream for cuda:3"),
    "older": ("", "this one has no aoti_torch_get_current_cuda_stream"),
    "not loaded": (None, "need a torch >= 2.10 built with CUDA; this one has no libtorch_cuda.so"),
}


@pytest.fixture(scope="module")
def look_up(tmp_path_factory):
    """A program that prints the stream of cuda:3, after loading the library in its argument in place of torch's."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("look_up")
    include = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{Path(__file__).parents[2] / 'csrc'}"]
    (folder / "main.cpp").write_text(LOOK_UP)
    subprocess.run(["g++", "-std=c++20", *include, folder / "main.cpp", "-o", folder / "main", "-ldl"], check=True)
    return folder / "main"


@pytest.mark.parametrize(("source", "expected"), LIBTORCH_CUDA.values(), ids=LIBTORCH_CUDA.keys())
def test_torchs_stream_is_looked_up_when_called_and_what_is_missing_is_named(look_up, tmp_path, source, expected):
    command = [look_up]
    if source is not None:
        (tmp_path / "stub.cpp").write_text(source)
        library = tmp_path / "stub.so"
        soname = "-Wl,-soname,libtorch_cuda.so"
        subprocess.run(["g++", "-shared", "-fPIC", soname, tmp_path / "stub.cpp", "-o", library], check=True)
        command.append(library)
    assert expected in subprocess.run(command, capture_output=True, text=True, check=True).stdout


ENTRIES = {
    "multi_lora": """
extern "C" int run(int type, int clusters, const int64_t* n, const void** in, const int64_t* ids, const float* weights,
                   void* y, float* partial) {
  cuda::Decode op{};
  op.type = static_cast<Type>(type), op.rows = n[0], op.picks = n[1], op.slots = n[2], op.rank = n[3];
  op.features_in = n[4], op.features_out = n[5], op.blocks = n[6];
  op.x = in[0], op.lora_a = in[1], op.lora_b = in[2], op.base = in[3], op.y = y;
  op.slot_ids = ids, op.weights = weights, op.partial = partial;
  return cuda::decode(op, clusters, nullptr);
}
""",
    "multi_lora_tokens": """
extern "C" int run(int type, int clusters, const int64_t* n, const void** in, const int64_t* ids, const float* weights,
                   void* y, float* partial) {
  cuda::Adapt op{};
  op.type = static_cast<Type>(type), op.samples = n[0], op.picks = n[1], op.slots = n[2], op.rank = n[3];
  op.features_in = n[4], op.features_out = n[5], op.blocks = n[6], op.tokens = n[7], op.tile = n[8];
  op.x = in[0], op.lora_a = in[1], op.lora_b = in[2], op.base = in[3], op.y = y;
  op.slot_ids = ids, op.weights = weights, op.partial = partial;
  return cuda::adapt(op, clusters, nullptr);
}
""",
}


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The kernels compiled for the CPU, by source file."""
    return {
        stem: compile_for_host((ROOT / f"csrc/cuda/{stem}.cu").read_text(), entry, tmp_path_factory.mktemp(stem))
        for stem, entry in ENTRIES.items()
    }


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "two launches"])
@pytest.mark.parametrize(
    ("dtype", "B", "P", "K", "r", "I", "O", "blocks"),
    [
        (torch.float32, 1, 1, 1, 1, 8, 8, 1),
        (torch.float32, 3, 7, 4, 12, 40, 1032, 4),
        (torch.bfloat16, 2, 5, 2, 8, 1024, 520, 8),
        (torch.float16, 2, 3, 2, 128, 264, 2064, 2),
        (torch.bfloat16, 2, 5, 2, 8, 16, 24, 8),
    ],
)
def test_the_decode_kernels_code_equals_the_specification(on_host, clusters, dtype, B, P, K, r, I, O, blocks):
    random = torch.Generator().manual_seed(0)
    x, a, b, base = (
        torch.randn(shape, generator=random).to(dtype) for shape in ((B, 1, I), (P, r, I), (P, r, O), (B, 1, O))
    )
    ids, weights = torch.randint(-1, P + 1, (B, K), generator=random), torch.rand(B, K, generator=random)
    known = torch.where(ids < P, ids, -1)  # an ID without a slot adds nothing
    for given in (base, None):
        y, partial = torch.empty_like(base), torch.empty(B * blocks * K * r)
        tensors = (ctypes.c_void_p * 4)(*(pointer(t) for t in (x, a, b, given)))
        sizes = numbers(B, K, P, r, I, O, blocks)
        status = on_host["multi_lora"](
            TYPES[dtype], clusters, sizes, tensors, pointer(ids), pointer(weights), pointer(y), pointer(partial)
        )
        assert status == 0
        with ops.use_backend("reference"):
            wide = [t if t is None else t.double() for t in (x, a, b, given)]
            expected = ops.multi_lora(*wide[:3], known, weights, wide[3])
        assert (y.double() - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "two launches"])
@pytest.mark.parametrize(
    ("dtype", "B", "T", "P", "K", "r", "I", "O", "tile", "blocks"),
    [
        (torch.bfloat16, 1, 1, 1, 1, 1, 8, 8, 32, 1),
        (torch.bfloat16, 2, 33, 5, 4, 12, 200, 136, 32, 2),
        (torch.float16, 2, 70, 5, 2, 8, 72, 264, 64, 1),
        (torch.bfloat16, 1, 150, 5, 4, 8, 392, 64, 64, 2),
        (torch.float16, 1, 5, 3, 2, 32, 16, 520, 32, 2),
    ],
)
def test_the_code_for_many_tokens_equals_the_specification(on_host, clusters, dtype, B, T, P, K, r, I, O, tile, blocks):
    random = torch.Generator().manual_seed(0)
    x, a, b, base = (
        torch.randn(shape, generator=random).to(dtype) for shape in ((B, T, I), (P, r, I), (P, r, O), (B, T, O))
    )
    ids, weights = torch.randint(-1, P + 1, (B, K), generator=random), torch.rand(B, K, generator=random)
    known = torch.where(ids < P, ids, -1)
    if dtype == torch.float16:
        x, b = x * 1000, b / 1000  # sums beyond float16's range
    for given in (base, None):
        y = torch.empty_like(base) if given is None else base.clone()
        partial = torch.empty(B * -(-T // tile) * blocks * 128 * (64 + 8))
        tensors = (ctypes.c_void_p * 4)(*(pointer(t) for t in (x, a, b, None if given is None else y)))
        status = on_host["multi_lora_tokens"](
            TYPES[dtype], clusters, numbers(B, K, P, r, I, O, blocks, T, tile), tensors, pointer(ids), pointer(weights),
            pointer(y), pointer(partial),
        )  # fmt: skip
        assert status == 0
        with ops.use_backend("reference"):
            wide = [t if t is None else t.double() for t in (x, a, b, given)]
            expected = ops.multi_lora(*wide[:3], known, weights, wide[3])
        assert (y.double() - expected).norm() <= (1e-2 if dtype == torch.bfloat16 else 2e-3) * expected.norm()


def on_gpu(dtype, B, T, P, K, r, I, O):
    """multi_lora arguments on a GPU, and the reference result in float64."""
    random = torch.Generator().manual_seed(0)
    x, a, b, base = (
        torch.randn(shape, generator=random).to("cuda", dtype) for shape in ((B, T, I), (P, r, I), (P, r, O), (B, T, O))
    )
    ids, weights = torch.randint(-1, P, (B, K), generator=random).cuda(), torch.rand(B, K, generator=random).cuda()
    with ops.use_backend("reference"):
        expected = ops.multi_lora(x.double(), a.double(), b.double(), ids, weights, base.double())
    return x, a, b, ids, weights, base, expected


@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "P", "K", "r", "I", "O"), [(1, 1, 1, 1, 8, 8), (33, 20, 4, 12, 768, 1032), (3, 7, 2, 128, 4096, 520)]
)
def test_decoding_equals_the_specification_and_ignores_ids_that_are_no_slots(dtype, B, P, K, r, I, O):
    x, a, b, ids, weights, base, expected = on_gpu(dtype, B, 1, P, K, r, I, O)
    with ops.use_backend("cuda"):
        got = ops.multi_lora(x, a, b, ids, weights, base)
        assert torch.equal(got, ops.multi_lora(x, a, b, ids.where(ids >= 0, P + 3), weights, base))
    assert (got.double() - expected).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


@no_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "T", "P", "K", "r", "I", "O"),
    [
        (1, 2, 1, 1, 1, 8, 8),
        (5, 131, 20, 4, 12, 768, 1032),
        (33, 37, 7, 2, 32, 520, 2048),
        (2, 512, 9, 4, 8, 4096, 4096),
    ],
)
def test_many_tokens_equal_the_specification_in_place_too(dtype, B, T, P, K, r, I, O):
    x, a, b, ids, weights, base, expected = on_gpu(dtype, B, T, P, K, r, I, O)
    with ops.use_backend("cuda"):
        got = ops.multi_lora(x, a, b, ids, weights, base)
        assert torch.equal(got, ops.multi_lora(x, a, b, ids.where(ids >= 0, P + 3), weights, base))
        plain = ops.multi_lora(x, a, b, ids, weights)
        assert torch.equal(got, multi_lora_(x, a, b, ids, weights, base))
    assert torch.equal(got, base)
    assert (got.double() - expected).norm() <= 2e-2 * expected.norm()
    alone = ops.multi_lora(x.float(), a.float(), b.float(), ids, weights)
    assert (plain.float() - alone).norm() <= 2e-2 * alone.norm()


@no_gpu
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_gives_an_empty_result(T, dtype):
    values = [torch.randn(3, 4, 64, device="cuda", dtype=dtype) for _ in range(2)]
    ids, weights = torch.empty(0, 2, dtype=torch.int64, device="cuda"), torch.empty(0, 2, device="cuda")
    assert ops.multi_lora(torch.empty(0, T, 64, device="cuda", dtype=dtype), *values, ids, weights).shape == (0, T, 64)
