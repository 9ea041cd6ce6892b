"""Bugs planted in the CUDA backend's convolutions and weight gradient: the emulator or the result has to show each."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch

from emulator import EmulatorError, Schedule
from emulator.backend import Emulated
from emulator.compilers import CSRC
from executors import needs_nvcc
from triton_cases import check_conv, check_grads

pytestmark = needs_nvcc
CONV, POOL, GRAD, SM90, SPLITS = (
    f"cuda/{name}.cu" for name in ("conv3x3", "pool_conv3x3", "weight_grad", "conv3x3_sm90", "conv3x3_splits")
)
TILE, POOLED, RING, INDEX, WAY_OUT, SM90_OUT = (
    f"cuda/{name}.h" for name in ("tile", "pooled_tile", "ring", "index", "way_out", "way_out_sm90")
)
MAP = "const __grid_constant__ CUtensorMap"
# In place of what chooses among all the instances: the ones that are run here.
INSTANCES = {
    CONV: "template __global__ void conv_kernel<BFloat16, Rectified, CopyChunks, kSmall>(Request);\n",
    POOL: "template __global__ void pool_kernel<BFloat16, 3, kSmall>(Request);\n",
    GRAD: "template __global__ void grad_kernel<BFloat16, Rectified, CopyChunks, kSmall>(Request);\n"
    "template __global__ void sum_kernel<__nv_bfloat16>(Request);\n",
    SM90: "".join(
        f"template __global__ void wgmma_kernel<BFloat16, {way_in}, 64>({MAP}, {MAP}, {MAP}, {MAP}, "
        "const __grid_constant__ PackedConvolution);\n"
        for way_in in ("Rectified", "Unchanged")
    )
    + "}\n",
    SPLITS: "template __global__ void splits_kernel<__nv_bfloat16, 8>(Request);\n",
}
SPLIT_LOOPS = (CONV, SM90)  # whose sums SPLITS adds: both are run
# By one cluster of two blocks. 3x3: four tiles, the last one of pixels beyond the images, two slices of channels;
# operand A from registers, and from shared memory. 1x1: more boxes than stages, while all tiles of weights have one;
# then by three clusters, of which two come back for another tile.
SM90_CASES = (
    (2, (3, 72, 5, 3), 40, "first of an rcu", 9),
    (2, (3, 72, 5, 3), 40, "gradient", 9),
    (2, (1, 520, 1, 3), 24, "plain", 1),
    (6, (9, 8, 1, 1), 8, "plain", 1),
)
SPLIT_CASE = (1, 200, 3, 9), 24, "first of an rcu"  # in three splits: seven slices of channels, or four
SCHEDULES = (Schedule(32, 1, "late"), Schedule(128, 0, "early"), Schedule(32, 2, "shuffled"))


class Mutant(NamedTuple):
    """``replacement`` for ``pattern``, which occurs once in ``file``; ``expect``: what is said of kernel ``source``."""

    name: str
    source: str
    file: str
    pattern: str
    replacement: str
    expect: str


BARRIER = "    __syncthreads();\n"
LOAD = "    if (next < steps) load(ring + next % kDepth * stage_bytes);\n"
NEXT = "    const int next = step + kDepth - 1;\n"
MUTANTS = (
    Mutant("no_wait", CONV, RING, "ptx::cp_async_wait<kDepth - 2>();", "", "in flight|race"),
    Mutant("waits_for_too_few", CONV, RING, "wait<kDepth - 2>", "wait<kDepth - 1>", "in flight|race"),
    Mutant("no_barrier", CONV, RING, BARRIER, "", "race"),
    Mutant("no_barrier_weight_grad", GRAD, RING, BARRIER, "", "race"),
    Mutant("loads_before_the_barrier", CONV, RING, BARRIER + NEXT + LOAD, NEXT + LOAD + BARRIER, "race"),
    Mutant("into_the_current_stage", GRAD, RING, "ring + next % kDepth", "ring + step % kDepth", "race|in flight"),
    Mutant("no_empty_groups", CONV, RING, "ptx::cp_async_commit();  // of a stage, or of nothing",
           "if (next < steps) ptx::cp_async_commit();", "in flight|race"),
    Mutant("no_barrier_behind_the_ring", CONV, RING, "__syncthreads();  // the ring has been read", "", "race"),
    Mutant("no_barrier_before_rows", CONV, TILE, "__syncthreads();  // rows are read", "// rows are read", "race"),
    Mutant("right_border", CONV, INDEX, "column < w;", "column <= w;", "out of bounds|result"),
    Mutant("upper_border", GRAD, INDEX, "row >= 0 &&", "row >= -1 &&", "out of bounds|result"),
    Mutant("one_pixel_too_many", CONV, CONV, "inside_[i] = pixel < pixels ?", "inside_[i] = pixel <= pixels ?",
           "out of bounds|result"),
    Mutant("channels_of_the_next_pixel", CONV, INDEX, "left < 0 ? 0", "left < 0 ? lanes", "out of bounds|result"),
    Mutant("stores_beyond_the_channels", CONV, TILE, "!place.inside || channel >= k", "!place.inside",
           "out of bounds|race|result|different values"),
    Mutant("stores_beyond_the_pixels", CONV, TILE, "!place.inside || channel >= k", "channel >= k", "out of bounds"),
    Mutant("reads_unturned_chunks", CONV, TILE, "narrow_chunk(row_of(pixel + m * 16 + lane % 16), chunk + lane / 16)",
           "row_of(pixel + m * 16 + lane % 16) * kNarrowRow + (chunk + lane / 16) * 16", "result"),
    Mutant("other_halves", GRAD, GRAD, "chunk + lane / 16));\n", "chunk + (lane / 16 ^ 1)));\n", "result"),
    Mutant("transposed_taps", CONV, INDEX, "{tap / side - side / 2, tap % side - side / 2}",
           "{tap % side - side / 2, tap / side - side / 2}", "out of bounds|result"),
    Mutant("first_split_left_out", GRAD, GRAD, "i = 0; i < count", "i = 1; i < count", "result"),
    Mutant("bias_after_relu", CONV, WAY_OUT, "AddBias, Rectify,", "Rectify, AddBias,", "result"),
    Mutant("sm90_box_not_awaited_empty", SM90, SM90,
           "ptx::mbarrier_wait(shared_.box_empty(box_.stage), box_.phase ^ 1);", "",
           "race|in flight|deadlock|arrivals"),
    Mutant("sm90_weights_not_awaited_empty", SM90, SM90,
           "ptx::mbarrier_wait(shared_.weights_empty(weight_.stage), weight_.phase ^ 1);", "",
           "race|in flight|deadlock|arrivals"),
    Mutant("sm90_box_not_awaited_full", SM90, SM90, "ptx::mbarrier_wait(shared_.box_full(box_.stage), box_.phase);", "",
           "race|in flight|uninitialised|undefined"),
    Mutant("sm90_weights_not_awaited_full", SM90, SM90,
           "ptx::mbarrier_wait(shared_.weights_full(weight_.stage), weight_.phase);", "",
           "race|in flight|uninitialised|undefined"),
    Mutant("sm90_expects_half_the_weights", SM90, SM90, "arrive_expect(full, Layout<kOuts>::kTileBytes)",
           "arrive_expect(full, Layout<kOuts>::kTileBytes / 2)", "race|in flight|uninitialised|deadlock|arrivals"),
    Mutant("sm90_expects_no_halo", SM90, SM90, "(kTileRows + 2 * radius) * kAtomBytes", "kTileRows * kAtomBytes",
           "race|in flight|uninitialised|deadlock"),
    Mutant("sm90_multicast_to_one", SM90, SM90, "(1 << kCluster) - 1", "1", "deadlock|race|in flight|uninitialised"),
    Mutant("sm90_box_released_too_early", SM90, SM90, "if (dy == 0 && box > 0) release_box(read_box);",
           "if (dy == 0) release_box(box_.stage);", "race|in flight|deadlock|arrivals"),
    Mutant("sm90_box_released_by_one_lane", SM90, SM90, "__syncwarp();  // every lane has read its rows", ";",
           "race"),
    Mutant("sm90_weights_released_too_early", SM90, SM90, "if (add) release_weights(read_weights);",
           "release_weights(weight_.stage);", "race|in flight|deadlock|arrivals"),
    Mutant("sm90_weights_released_at_home_only", SM90, SM90, "if (lane < kCluster) ptx::mbarrier_arrive_at",
           "if (lane == ptx::cluster_rank()) ptx::mbarrier_arrive_at", "deadlock"),
    Mutant("sm90_products_not_awaited", SM90, SM90, "ptx::wgmma_wait<1>();\n    } else {", "\n    } else {",
           "race|in flight"),
    Mutant("sm90_products_of_registers_not_awaited", SM90, SM90, "ptx::wgmma_wait<1>();\n    }\n  }", "\n    }\n  }",
           "race|in flight"),
    Mutant("sm90_sums_not_awaited", SM90, SM90, "ptx::wgmma_wait<0>();", "", "in flight"),
    Mutant("sm90_no_fence_of_registers", SM90, SM90, "(left[i % 2]);\n      ptx::wgmma_fence();", "(left[i % 2]);",
           "wgmma.fence"),
    Mutant("sm90_no_fence_of_sums", SM90, SM90, "      ptx::wgmma_fence();\n#pragma unroll", "#pragma unroll",
           "wgmma.fence"),
    Mutant("sm90_no_fence_of_initialisation", SM90, SM90, "ptx::fence_mbarrier_init();", "",
           "race|uninitialised|initialis"),
    Mutant("sm90_proxy_fence_of_one_lane", SM90, SM90_OUT, "ptx::fence_proxy_async();",
           "if (lane == 0) ptx::fence_proxy_async();", "proxy fence"),
    Mutant("sm90_adds_to_the_last_tile", SM90, SM90, "const bool add = box > 0 || dy > 0;", "const bool add = true;",
           "result|arrivals|race|in flight|deadlock"),
    Mutant("sm90_begins_alone", SM90, SM90, "ptx::cluster_sync();  // nobody", "// nobody",
           "race|uninitialised|undefined|exited|deadlock"),
    Mutant("sm90_ends_alone", SM90, SM90, "waited for all of it.)\n  ptx::cluster_sync();", "waited for all of it.)\n",
           "exited"),
    Mutant("sm90_upper_border", SM90, SM90, "first.row - radius, first.image", "first.row - radius + 1, first.image",
           "result"),
    Mutant("sm90_stores_beyond_the_row", SM90, SM90_OUT, "at.column >= w", "at.column > w",
           "out of bounds|race|result|different values"),
    Mutant("sm90_same_row_for_every_tap", SM90, SM90, "(group_ * kGroupRows + dy)", "(group_ * kGroupRows)", "result"),
    Mutant("sm90_reads_unturned_chunks", SM90, SM90, "((i * 2 + lane / 16) ^ pixel % 8)", "(i * 2 + lane / 16)",
           "result"),
    Mutant("sm90_clusters_begin_with_the_first", SM90, SM90, "next_(blockIdx.x / kCluster)", "next_(0)", "result"),
    Mutant("sm90_leaves_tiles_out", SM90, SM90, "next_ += gridDim.x / kCluster;", "next_ += gridDim.x;", "result"),
    Mutant("everyone_sums_the_bias", GRAD, GRAD, "p.gb ? part.share : -1", "p.gb ? 0 : -1", "result"),
    Mutant("shares_of_the_bias_left_out", GRAD, GRAD, "request.splits * request.shares, p.k", "request.splits, p.k",
           "result"),
    Mutant("no_barrier_pool", POOL, RING, BARRIER, "", "race"),
    Mutant("no_wait_pool", POOL, RING, "ptx::cp_async_wait<kDepth - 2>();", "", "in flight|race"),
    Mutant("no_barrier_behind_the_ring_pool", POOL, RING, "__syncthreads();  // the ring has been read", "", "race"),
    Mutant("columns_before_rows_end", POOL, POOL, "__syncthreads();  // rows have become maxima", "", "race"),
    Mutant("products_before_columns_end", POOL, POOL, "__syncthreads();  // columns have", "", "race"),
    Mutant("one_slice_at_once", POOL, POOLED, "kSide == 1 ? 3 : 2;", "kSide == 1 ? 3 : 1;", "in flight|race"),
    Mutant("halo_too_narrow", POOL, POOLED, "= kSide / 2 + kPoolRadius;", "= kSide / 2 + kPoolRadius - 1;", "result"),
    Mutant("halo_beyond_the_image", POOL, POOLED, "at < size ? at :", "at <= size ? at :", "out of bounds|result"),
    Mutant("windows_of_four", POOL, POOL, "one[i + 4]", "one[i + 3]", "result"),
    Mutant("pooled_border", POOL, POOL, "if (!real) return {0, 0};", "", "result"),
    Mutant("rows_of_the_next_tap", POOL, POOLED, "tap % kSide);", "(tap + 1) % kSide);", "result"),
    Mutant("sm90_rows_read_at_once", SM90, SM90_OUT, "__syncwarp();  // rows are read", "// rows are read", "race"),
    Mutant("sm90_slice_not_awaited_read", SM90, SM90_OUT, "__syncwarp();  // the slice has been read", "", "race"),
    Mutant("sm90_no_proxy_fence_before_a_store", SM90, SM90_OUT, "ptx::fence_proxy_async();", "", "proxy fence"),
    Mutant("sm90_buffer_not_awaited", SM90, SM90_OUT, "if (lane == 0) ptx::bulk_wait_read<1>();", "", "race|in flight"),
    Mutant("sm90_waits_for_another_buffer", SM90, SM90_OUT, "bulk_wait_read<1>", "bulk_wait_read<2>", "race|in flight"),
    Mutant("sm90_buffer_awaited_by_one_lane", SM90, SM90_OUT,
           "__syncwarp();  // the store before", "// the store before", "race|in flight"),
    Mutant("sm90_stores_what_others_write", SM90, SM90_OUT, "__syncwarp();  // all lanes have written",
           "// all lanes have written", "race|proxy fence|uninitialised"),
    Mutant("sm90_stores_not_committed", SM90, SM90_OUT, "ptx::bulk_commit();", "", "race|in flight"),
    Mutant("sm90_last_stores_not_awaited", SM90, SM90_OUT,
           "if (plain_ && threadIdx.x % 32 == 0) ptx::bulk_wait_read<0>();", "", "in flight"),
    Mutant("sm90_unturned_chunks_stored", SM90, SM90_OUT, "buffer + narrow_chunk(lane % 16, i * 2 + lane / 16)",
           "buffer + lane % 16 * 64 + (i * 2 + lane / 16) * 16", "result"),
    Mutant("sm90_bias_of_the_next_channels", SM90, SM90_OUT, "channel = first + n * 8;", "channel = first + n * 8 + 2;",
           "result|out of bounds"),
    Mutant("sm90_bias_beyond_the_channels", SM90, SM90_OUT, "channel < k ? p.out.bias", "true ? p.out.bias",
           "out of bounds"),
    Mutant("split_left_out", SPLITS, SPLITS, "split = 0; split < p.splits", "split = 1; split < p.splits", "result"),
    Mutant("one_split_too_many", SPLITS, SPLITS, "split < p.splits", "split <= p.splits", "out of bounds"),
    Mutant("parts_of_the_next_pixel", SPLITS, SPLITS, "int64_t{pixel} * k + channel;\n", "int64_t{pixel} * k + k;\n",
           "out of bounds|result"),
    Mutant("pixels_beyond_the_parts", SPLITS, SPLITS, "if (pixel >= pixels) return;", "", "out of bounds"),
    Mutant("split_of_unequal_halves", SPLITS, CONV, "end = split_begin(slices, split + 1, p.splits)",
           "end = begin + slices / p.splits", "result"),
    Mutant("every_split_begins_anew", SPLITS, CONV, "first_pixel, first_out, begin)", "first_pixel, first_out, 0)",
           "result"),
    Mutant("weights_of_another_split", SPLITS, CONV, "weights_.skip(first_slice);", "", "result"),
    Mutant("splits_share_a_part", SPLITS, WAY_OUT, "p.parts + split * (pixels_of(p.shape) * p.k)", "p.parts",
           "race|result"),
    Mutant("sm90_split_takes_all_slices", SPLITS, SM90, "return split_begin(slices_, split + 1, splits_);",
           "return slices_;", "result"),
    Mutant("sm90_split_multiplies_too_many", SPLITS, SM90, "(tiles.end() - tiles.begin()) * side, side",
           "(tiles.end() - tiles.begin() + 1) * side, side", "deadlock|race"),
    Mutant("sm90_parts_stored_by_tma", SPLITS, "cuda/plan_sm90.h", "p.splits <= 1 && !p.out.select", "!p.out.select",
           "result|bounds|map|undefined|launch"),
    Mutant("odd_pitch", CONV, INDEX, "return tile + 8;", "return tile + 5;", "not aligned"),
)  # fmt: skip


def reduced(source: str) -> str:
    """A source with one instance of each of its kernels."""
    kernels, _, _ = re.split(r"(using Kernel =|template <class T>\nstruct Sum )", (CSRC / source).read_text())
    return f"{kernels}{INSTANCES[source]}}}\n}}\n"


def changed(mutant: Mutant) -> dict[str, str]:
    """The mutant's sources, by their paths below csrc."""
    texts = {mutant.file: (CSRC / mutant.file).read_text(), **instances(mutant.source)}
    count = texts[mutant.file].count(mutant.pattern)
    assert count == 1, f"{mutant.name}: {mutant.pattern!r} occurs {count} times"
    texts[mutant.file] = texts[mutant.file].replace(mutant.pattern, mutant.replacement)
    return texts


def instances(source: str) -> dict[str, str]:
    """Reduced sources of what is run to run this one."""
    return {path: reduced(path) for path in (source, *(SPLIT_LOOPS if source == SPLITS else ()))}


def split_error(kernels: Emulated) -> tuple[float, float]:
    kernels.splits = 3
    return check_conv(kernels, *SPLIT_CASE[:2], torch.bfloat16, SPLIT_CASE[2])


def finding(source: str, texts: dict[str, str]) -> str:
    """What is said of it; "" if nothing is wrong."""
    for schedule in SCHEDULES:
        kernels = Emulated(schedule=schedule, tile=64, changed=texts)
        kernels.splits = 1
        try:
            if source == SM90:
                for processors, shape, k, way, taps in SM90_CASES:
                    kernels = Emulated("sm_90a", schedule, tile=64, processors=processors, changed=texts)
                    kernels.splits = 1
                    error, limit = check_conv(kernels, shape, k, torch.bfloat16, way, taps=taps)
                    if error > limit:
                        break
            elif source == SPLITS:
                error, limit = split_error(kernels)
                if error <= limit:
                    hopper = Schedule(128, schedule.seed, schedule.completion)
                    error, limit = split_error(Emulated("sm_90a", hopper, tile=64, processors=2, changed=texts))
            elif source != GRAD:  # two images; both channels end within a tile
                pool, shape = source == POOL, (1, 72, 3, 9) if source == POOL else (2, 40, 5, 7)
                error, limit = check_conv(kernels, shape, 24, torch.bfloat16, "first of an rcu", pool=pool)
            else:
                error, limit = check_grads(kernels, (2, 24, 5, 17), 40, torch.bfloat16)
        except EmulatorError as found:
            return str(found)
        except AssertionError:
            return "result"
        if error > limit:
            return "result"
    return ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant(mutant):
    said = finding(mutant.source, changed(mutant))
    assert re.search(mutant.expect, said), f"expected {mutant.expect}, got {said or 'nothing'}"


@pytest.mark.parametrize("source", [CONV, POOL, GRAD, SM90, SPLITS])
def test_nothing_is_said_of_the_kernels_themselves(source):
    assert finding(source, instances(source)) == ""
