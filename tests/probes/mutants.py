"""Bugs planted in the convolutions of ``conv_probes``, one in each mutant, and what a check should say of it.

``expect`` is a regular expression for the finding: "race" (accesses to shared memory that nothing orders), "proxy
fence", "wgmma.fence", "in flight" (registers or bytes of an unfinished asynchronous operation), "uninitialised",
"undefined" (values, or barriers), "deadlock", "arrivals" (more than an mbarrier expects), "exited" (shared memory of a
block that is gone), "out of bounds", "not aligned", "result" (numbers only); alternatives where the order of events
decides. None: no result can change on hardware, for ``reason``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from probes.conv_probes import PROBES

KERNELS = {probe.name: probe.kernel for probe in PROBES}
SOURCES = {probe.name: Path(__file__).with_name(probe.source) for probe in PROBES}


@dataclass(frozen=True)
class Mutant:
    """``replacement`` for ``pattern``, which occurs once in the probe's source."""

    name: str
    probe: str
    pattern: str
    replacement: str
    kind: str
    expect: str | None
    reason: str = ""


def sources(mutant: Mutant) -> str:
    """The mutated source."""
    text = SOURCES[mutant.probe].read_text()
    count = text.count(mutant.pattern)
    assert count == 1, f"{mutant.name}: {mutant.pattern!r} occurs {count} times"
    return text.replace(mutant.pattern, mutant.replacement)


TOGETHER = 12  # mutants of a source that are compiled as one: most of the time goes into the headers


def renamed(mutant: Mutant) -> str:
    """Its kernel's name beside the others'."""
    return f"{KERNELS[mutant.probe]}_{mutant.name}"


def together(mutant: Mutant) -> str:
    """One source of a mutant and its neighbours, each in a namespace, its kernels renamed; lines are still its own."""
    source = SOURCES[mutant.probe]
    siblings = [m for m in MUTANTS if SOURCES[m.probe] == source]
    first = siblings.index(mutant) // TOGETHER * TOGETHER
    headers = dict.fromkeys(re.findall(r"^#include.*$", source.read_text(), flags=re.M))
    parts = ["\n".join(headers)]
    for sibling in siblings[first : first + TOGETHER]:
        text = re.sub(r"^#include.*$", "", sources(sibling), flags=re.M)
        text = re.sub(r"\bconv3x3_sm\d+(_cluster)?(?=\()", rf"\g<0>_{sibling.name}", text)
        parts.append(f'namespace {sibling.name} {{\n#line 1 "{source.name}"\n{text}\n}}')
    return "\n".join(parts)


def _of(probe: str, *rows: tuple[str, ...]) -> tuple[Mutant, ...]:
    """Rows: name, kind, expect ("" for None), pattern, replacement, reason."""
    return tuple(
        Mutant(name, probe, pattern, replacement, kind, expect or None, *reason)
        for name, kind, expect, pattern, replacement, *reason in rows
    )


# Two images, so tiles over both; 40 input and 72 output channels, so both end within a tile; 18 steps.
AMPERE = _of(
    "conv3x3_sm80_2x5x7x40_72_residual",
    ("sm80_no_wait", "missing cp.async wait", "in flight|race", "ptx::cp_async_wait<kStages - 2>();", ""),
    (
        "sm80_waits_for_too_few",
        "wait_group with the wrong number",
        "in flight|race",
        "cp_async_wait<kStages - 2>",
        "cp_async_wait<kStages - 1>",
    ),
    ("sm80_no_barrier_in_the_loop", "missing barrier", "race", "__syncthreads();  // everyone's", "// everyone's"),
    ("sm80_no_barrier_before_the_epilogue", "missing barrier", "race", "__syncthreads();  // the ring", "// the ring"),
    ("sm80_no_barrier_in_the_epilogue", "missing barrier", "race", "__syncthreads();  // rows", "// rows"),
    (
        "sm80_no_commit_before_the_loop",
        "missing commit",
        "in flight|race",
        "ptx::cp_async_commit();  // commit: a stage before the loop",
        "",
    ),
    (
        "sm80_no_commit_in_the_loop",
        "missing commit",
        "in flight|race",
        "ptx::cp_async_commit();  // commit: a stage, or nothing",
        "",
    ),
    (
        "sm80_no_empty_groups",  # the last step's copies are the last group and not waited for
        "missing commit",
        "in flight|race",
        "ptx::cp_async_commit();  // commit: a stage, or nothing",
        "if (next < steps) ptx::cp_async_commit();",
    ),
    (
        "sm80_loads_before_the_barrier",
        "stage released too early",
        "race",
        "__syncthreads();  // everyone's copies are there, and everyone has done with the stage that is loaded next\n"
        "    const int next = step + kStages - 1;\n"
        "    if (next < steps) loader.load(next, ring + next % kStages * kStageBytes);",
        "const int next = step + kStages - 1;\n"
        "    if (next < steps) loader.load(next, ring + next % kStages * kStageBytes);\n"
        "    __syncthreads();",
    ),
    (
        "sm80_loads_into_the_current_stage",
        "wrong index",
        "race|in flight",
        "ring + next % kStages * kStageBytes",
        "ring + step % kStages * kStageBytes",
    ),
    (
        "sm80_loads_one_stage_before_the_loop",
        "wrong bound",
        "in flight|race|uninitialised",
        "step < kStages - 1;",
        "step < kStages - 2;",
    ),
    (
        "sm80_reads_unswizzled",
        "wrong swizzle",
        "result",
        "swizzled(first_pixel + m * 16 + lane % 16, k + lane / 16)",
        "(first_pixel + m * 16 + lane % 16) * kRowBytes + (k + lane / 16) * 16",
    ),
    (
        "sm80_other_swizzle",
        "wrong swizzle",
        "",
        "(row >> 1 & 3)",
        "(row & 3)",
        "writing and reading agree: only banks conflict",
    ),
    ("sm80_left_of_the_image", "wrong predicate", "out of bounds|result", "column[i] + dx >= 0 && ", ""),
    ("sm80_no_zero_fill", "wrong predicate", "result", "copied ? 16 : 0", "16"),
    (
        "sm80_one_pixel_too_many",
        "wrong bound",
        "out of bounds",
        "pixel[i] < s.n * s.h * s.w",
        "pixel[i] <= s.n * s.h * s.w",
    ),
    (
        "sm80_one_chunk_of_channels_too_many",  # times weights of zero: the numbers stay right
        "wrong bound",
        "out of bounds",
        "in_batch && channel < s.c",
        "in_batch && channel <= s.c",
    ),
    (
        "sm80_transposed_taps",
        "wrong index",
        "result",
        "dy = tap / 3 - 1, dx = tap % 3 - 1",
        "dy = tap % 3 - 1, dx = tap / 3 - 1",
    ),
    ("sm80_stores_beyond_the_pixels", "wrong bound", "out of bounds", "pixel >= int64_t{n} * h * width || ", ""),
    ("sm80_stores_beyond_the_channels", "wrong bound", "out of bounds|race|result", " || out >= k", ""),
    ("sm80_odd_pitch", "wrong index", "not aligned", "kPitch = kOut + 8;", "kPitch = kOut + 6;"),
    ("sm80_fragment_rows", "wrong index", "race|uninitialised|result", "pair + 8 * kPitch", "pair + 4 * kPitch"),
) + _of(
    "conv3x3_sm80_1x5x7x64_64",
    ("sm80_residual_always", "wrong predicate", "out of bounds", "if (residual != nullptr) ", ""),
)

# Two tiles a block, of 9 steps each.
HOPPER = _of(
    "conv3x3_sm90_1x9x16x64_128",
    (
        "sm90_stage_not_awaited_empty",
        "missing mbarrier wait",
        "race|in flight|deadlock|arrivals",
        "wait<kCluster>(shared.empty(at.stage), at.phase ^ 1);",
        "",
    ),
    (
        "sm90_stage_not_awaited_full",
        "missing mbarrier wait",
        "race|in flight|undefined",
        "wait<kCluster>(shared.full(at.stage), at.phase);",
        "",
    ),
    (
        "sm90_expects_nothing",
        "missing expect_tx",
        "race|in flight|uninitialised",
        "mbarrier_arrive_expect_tx(full, kXBytes + kWBytes)",
        "mbarrier_arrive(full)",
    ),
    (
        "sm90_expects_too_little",
        "short expect_tx",
        "race|in flight|uninitialised|deadlock",
        "mbarrier_arrive_expect_tx(full, kXBytes + kWBytes)",
        "mbarrier_arrive_expect_tx(full, kXBytes)",
    ),
    (
        "sm90_expects_too_much",
        "long expect_tx",
        "deadlock",
        "mbarrier_arrive_expect_tx(full, kXBytes + kWBytes)",
        "mbarrier_arrive_expect_tx(full, kXBytes + kWBytes + 16)",
    ),
    (
        "sm90_stages_never_released",
        "wrong arrive count",
        "deadlock",
        "if (step > 0) release<kCluster>(shared.empty(previous));",
        "",
    ),
    (
        "sm90_last_stage_never_released",
        "wrong arrive count",
        "deadlock",
        "release<kCluster>(shared.empty(previous));  // the last stage of the tile",
        "",
    ),
    (
        "sm90_released_before_the_wait",
        "stage released too early",
        "race|in flight",
        "ptx::wgmma_wait<1>();  // all but this step's, which runs on\n"
        "      if (step > 0) release<kCluster>(shared.empty(previous));",
        "if (step > 0) release<kCluster>(shared.empty(previous));\n      ptx::wgmma_wait<1>();",
    ),
    (
        "sm90_released_while_multiplied",
        "stage released too early",
        "race|in flight|deadlock",
        "if (step > 0) release<kCluster>(shared.empty(previous));\n      previous = at.stage;",
        "previous = at.stage;\n      if (step > 0) release<kCluster>(shared.empty(previous));",
    ),
    ("sm90_no_wgmma_wait_in_the_loop", "missing wgmma wait", "race|in flight", "ptx::wgmma_wait<1>();", ""),
    (
        "sm90_two_wgmma_groups_in_flight",
        "wait_group with the wrong number",
        "race|in flight",
        "wgmma_wait<1>",
        "wgmma_wait<2>",
    ),
    ("sm90_sums_not_awaited", "missing wgmma wait", "in flight", "ptx::wgmma_wait<0>();", ""),
    (
        "sm90_sums_but_one_group_awaited",
        "wait_group with the wrong number",
        "in flight",
        "wgmma_wait<0>",
        "wgmma_wait<1>",
    ),
    ("sm90_no_wgmma_fence", "missing wgmma fence", "wgmma.fence", "ptx::wgmma_fence();", ""),
    ("sm90_no_wgmma_commit", "missing commit", "in flight|race", "ptx::wgmma_commit();", ""),
    (
        "sm90_consumer_a_phase_ahead",
        "wrong phase",
        "race|in flight|uninitialised",
        "Position at;  // position: of a consumer",
        "Position at{0, 1};",
    ),
    (
        "sm90_producer_a_phase_ahead",
        "wrong phase",
        "deadlock",
        "Position at;  // position: of the producer",
        "Position at{0, 1};",
    ),
    (
        "sm90_phase_never_turns",
        "wrong phase",
        "race|in flight|deadlock|arrivals",
        "phase ^= 1;  // phase: another lap",
        "",
    ),
    (
        "sm90_producer_begins_anew_each_tile",
        "wrong phase",
        "deadlock|race|in flight|arrivals",
        "Position at;  // position: of the producer\n  while (tiles.take()) {\n",
        "while (tiles.take()) {\n    Position at;\n",
    ),
    ("sm90_no_proxy_fence", "missing proxy fence", "proxy fence", "ptx::fence_proxy_async_shared();", ""),
    (
        "sm90_proxy_fence_of_one_thread",
        "missing proxy fence",
        "proxy fence",
        "ptx::fence_proxy_async_shared();",
        "if (thread == 0) ptx::fence_proxy_async_shared();",
    ),
    (
        "sm90_proxy_fence_after_the_barrier",
        "missing proxy fence",
        "",
        "ptx::fence_proxy_async_shared();       // what this thread wrote, before TMA reads it\n"
        "    ptx::bar_sync(1 + group, kWarpgroup);",
        "ptx::bar_sync(1 + group, kWarpgroup);\n    ptx::fence_proxy_async_shared();",
        "a proxy fence anywhere between the writes and the copy orders them, and the storing thread passes one",
    ),
    (
        "sm90_buffer_stored_unfinished",
        "missing barrier",
        "race|proxy fence|uninitialised",
        "ptx::bar_sync(1 + group, kWarpgroup);  // barrier: the whole tile is in the buffer",
        "",
    ),
    (
        "sm90_buffer_reused_by_the_others",  # only the storing thread knows that it may be
        "missing barrier",
        "race|in flight",
        "ptx::bar_sync(1 + group, kWarpgroup);       // barrier: the last tile has left the buffer",
        "",
    ),
    (
        "sm90_groups_share_a_barrier",
        "wrong index",
        "race|deadlock|undefined",
        "ptx::bar_sync(1 + group, kWarpgroup);  // barrier: the whole tile is in the buffer",
        "ptx::bar_sync(1, kWarpgroup);",
    ),
    (
        "sm90_store_not_awaited",
        "missing bulk wait before buffer reuse",
        "in flight|race",
        "if (thread == 0) ptx::bulk_wait_read<0>();",
        "",
    ),
    (
        "sm90_store_awaited_by_another",  # bulk groups are a thread's own
        "missing bulk wait before buffer reuse",
        "in flight|race",
        "if (thread == 0) ptx::bulk_wait_read<0>();",
        "if (thread == 1) ptx::bulk_wait_read<0>();",
    ),
    (
        "sm90_store_may_be_pending",
        "wait_group with the wrong number",
        "in flight|race",
        "bulk_wait_read<0>",
        "bulk_wait_read<1>",
    ),
    ("sm90_no_bulk_commit", "missing commit", "in flight|race", "ptx::bulk_commit();", ""),
    ("sm90_ends_with_a_store_in_flight", "missing bulk wait", "in flight", "if (thread == 0) ptx::bulk_wait<0>();", ""),
    (
        "sm90_ends_with_a_store_read",
        "missing bulk wait",
        "",
        "ptx::bulk_wait<0>",
        "ptx::bulk_wait_read<0>",
        "shared memory only has to outlive the reads; the end of the kernel orders the writes",
    ),
    ("sm90_stride", "wrong descriptor", "result", "kAtomBytes, 128);", "kAtomBytes / 2, 128);"),
    ("sm90_descriptor_of_64_bytes", "wrong descriptor", "result", "kAtomBytes, 128);", "kAtomBytes, 64);"),
    (
        "sm90_leading_offset",
        "wrong descriptor",
        "",
        "ptx::wgmma_descriptor(start, 16,",
        "ptx::wgmma_descriptor(start, 0,",
        "not used where the operand is as wide as its swizzle",
    ),
    ("sm90_same_channels_again", "wrong descriptor", "result", "b + i * 2", "b"),
    ("sm90_same_pixels_in_both_groups", "wrong index", "result", " + group * kGroupBytes), b", "), b"),
    ("sm90_writes_unswizzled", "wrong swizzle", "result", "(chunk ^ pixel % 8)", "chunk"),
    ("sm90_taps_off_by_one", "wrong index", "result", "tap % 3 - 1", "tap % 3"),
    ("sm90_adds_to_the_last_tile", "wrong predicate", "result", "step > 0 || i > 0", "true"),
    ("sm90_one_buffer_for_both_groups", "wrong index", "race", "y = shared.y(group);", "y = shared.y(0);"),
    ("sm90_both_groups_store_above", "wrong index", "result|race", "tiles.row + group * kGroupH", "tiles.row"),
    ("sm90_two_threads_store", "wrong predicate", "in flight|race", "if (thread == 0) {", "if (thread < 2) {"),
    (
        "sm90_one_group_releases",
        "wrong arrive count",
        "race|in flight|deadlock",
        "kCluster * kConsumers * kWarpgroup / 32",
        "kCluster * kWarpgroup / 32",
    ),
    (
        "sm90_one_warp_too_many",
        "wrong arrive count",
        "deadlock",
        "kCluster * kConsumers * kWarpgroup / 32",
        "kCluster * kConsumers * kWarpgroup / 32 + 1",
    ),
    ("sm90_two_producers", "wrong arrive count", "deadlock", "(shared.full(stage), 1);", "(shared.full(stage), 2);"),
    (
        "sm90_barriers_used_at_once",
        "missing barrier",
        "race|uninitialised|undefined",
        "__syncthreads();  // barriers are initialised",
        "",
    ),
    (
        "sm90_no_fence_of_initialisation",
        "missing fence of initialisation",
        "",
        "ptx::fence_mbarrier_init();",
        "",
        "__syncthreads() orders initialising before the producer's copies; the fence is for other blocks' use, "
        "though CUDA's guide puts one here too",
    ),
) + _of(
    "conv3x3_sm90_2x5x7x72_72",
    ("sm90_bias", "wrong bound", "out of bounds", "if (out < k) offset", "if (out <= k) offset"),
    ("sm90_slices", "wrong bound", "deadlock", "steps = kTaps * ((c + kSlice - 1) / kSlice)", "steps = kTaps * 3"),
)

CLUSTER = _of(
    "conv3x3_sm90_cluster_1x9x16x64_128",
    (
        "cluster_begins_alone",
        "missing cluster barrier",
        "race|uninitialised|undefined",
        "cluster_arrive_relaxed();  // the fence above has released what there is to release\n    ptx::cluster_wait();",
        "__syncthreads();",
    ),
    (
        "cluster_no_fence_of_initialisation",
        "missing fence of initialisation",
        "race",
        "ptx::fence_mbarrier_init();",
        "",
    ),
    ("cluster_ends_alone", "missing cluster barrier", "exited", "ptx::cluster_sync();  // cluster barrier: end", ""),
    ("cluster_mask_of_one", "wrong multicast mask", "deadlock", "(1 << kCluster) - 1", "1 << tiles.rank"),
    ("cluster_mask_of_the_first", "wrong multicast mask", "deadlock", "(1 << kCluster) - 1", "1"),
    (
        "cluster_releases_to_itself",
        "wrong arrive count",
        "deadlock",
        "if (lane < kCluster) ptx::mbarrier_arrive_cluster(ptx::mapa(empty, lane));",
        "if (lane == 0) ptx::mbarrier_arrive(empty);",
    ),
    (
        "cluster_releases_to_itself_twice",  # as many arrivals as expected, but not the other block's
        "stage released too early",
        "race|in flight",
        "ptx::mapa(empty, lane)",
        "ptx::mapa(empty, ptx::cluster_rank())",
    ),
    (
        "cluster_expects_its_own_releases",
        "wrong arrive count",
        "race|in flight|deadlock",
        "kCluster * kConsumers * kWarpgroup / 32",
        "kConsumers * kWarpgroup / 32",
    ),
    (
        "cluster_scope_of_the_wait",
        "missing mbarrier wait",
        "",
        "ptx::mbarrier_wait_cluster(barrier, parity)",
        "ptx::mbarrier_wait(barrier, parity)",
        "only reads precede the other block's arrival, and they are complete; CUTLASS waits in the block's scope",
    ),
    ("cluster_loads_one_part_twice", "wrong index", "result", "tiles.out + part);", "tiles.out);"),
    (
        "cluster_loads_both_parts_to_one_place",
        "wrong index",
        "race|uninitialised",
        "shared.w(at.stage) + part * kRowBytes",
        "shared.w(at.stage)",
    ),
    ("cluster_part_between_rows", "wrong index", "not aligned", "part * kRowBytes", "part * 2"),
) + _of(
    "conv3x3_sm90_cluster_3x5x7x72_72",
    (
        "cluster_odd_tile_left_out",
        "wrong bound",
        "result",
        "(n * down * across + kCluster - 1) / kCluster",
        "n * down * across / kCluster",
    ),
)

MUTANTS: tuple[Mutant, ...] = (*AMPERE, *HOPPER, *CLUSTER)
assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
