"""The executor of PTX by itself, on kernels written here: it computes what the PTX ISA says and finds what is wrong."""

import numpy as np
import pytest
import torch

from tests.gpu.ptx.findings import Deadlock, Misaligned, OutOfBounds, PtxError, Unsupported
from tests.gpu.ptx.launch import execute, without
from tests.gpu.ptx.machine import SCHEDULES

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def module(body, buffers=1, threads=32, shared=0):
    """A kernel whose %rd0, %rd1, ... are its buffers, %rd9 and %r9 are 4 * and 1 * the thread's number in its block."""
    params = ", ".join(f".param .u64 .ptr .global .align 1 k_{i}" for i in range(buffers))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [k_{i}];" for i in range(buffers))
    memory = f".shared .align 128 .b8 memory[{shared}];" if shared else ""
    return f"""
        .version 8.8
        .target sm_90a
        .address_size 64
        {memory}
        .visible .entry k({params})
        .reqntid {threads}
        {{
            .reg .pred %p<10>; .reg .b16 %rs<10>; .reg .b32 %r<40>; .reg .b64 %rd<20>; .reg .b32 %acc<8>;
            {loads}
            mov.u32 %r9, %tid.x;
            mul.wide.u32 %rd9, %r9, 4;
            {body}
            ret;
        }}
    """


def run(body, *buffers, grid=1, threads=32, shared=0, schedule="forward"):
    text = module(body, len(buffers), threads, shared)
    named = {f"buffer{i}": buffer for i, buffer in enumerate(buffers)}
    return execute(text, (grid, 1, 1), named, schedule=schedule)


def unary(instruction, value, destination="%r1", kind=torch.int32):
    """The 32 bits that an instruction on %r0 (and %rs0, its lower half) leaves, for one value."""
    x, y = torch.full((32,), value).to(kind), torch.zeros(32, dtype=kind)
    run(
        f"""add.s64 %rd10, %rd0, %rd9; add.s64 %rd11, %rd1, %rd9;
            ld.global.b32 %r0, [%rd10]; cvt.u16.u32 %rs0, %r0; mov.b32 %r1, 0;
            {instruction}
            st.global.b32 [%rd11], {destination};""",
        x,
        y,
    )
    assert (y == y[0]).all() or y.isnan().all()
    return y[0].item()


@pytest.mark.parametrize(
    ("instruction", "value", "expected"),
    [
        ("add.s32 %r1, %r0, 5;", 2**31 - 3, -(2**31) + 2),
        ("sub.s32 %r1, 3, %r0;", 5, -2),
        ("mul.lo.s32 %r1, %r0, 65537;", 65537, (65537**2) % 2**32),
        ("mul.hi.s32 %r1, %r0, -3;", 2**30, -1),
        ("mul.hi.u32 %r1, %r0, 0xffffffff;", 7, 6),
        ("mul.wide.s32 %rd10, %r0, -2; cvt.u32.u64 %r1, %rd10;", 21, -42),
        ("mad.lo.s32 %r1, %r0, 3, 4;", 5, 19),
        ("div.s32 %r1, %r0, 4;", -7, -1),
        ("rem.s32 %r1, %r0, 4;", -7, -3),
        ("div.u32 %r1, %r0, 16;", -1, 2**28 - 1),
        ("min.s32 %r1, %r0, 3;", -4, -4),
        ("max.u32 %r1, %r0, 3;", -4, -4),
        ("abs.s32 %r1, %r0;", -9, 9),
        ("neg.s32 %r1, %r0;", 9, -9),
        ("not.b32 %r1, %r0;", 5, -6),
        ("and.b32 %r1, %r0, 12;", 10, 8),
        ("shl.b32 %r1, %r0, 4;", 3, 48),
        ("shl.b32 %r1, %r0, 32;", 3, 0),
        ("shr.s32 %r1, %r0, 40;", -3, -1),
        ("shr.u32 %r1, %r0, 28;", -1, 15),
        ("bfe.u32 %r1, %r0, 3, 4;", 0b1011010, 0b1011),
        ("bfe.s32 %r1, %r0, 3, 4;", 0b1011010, 0b1011 - 16),
        ("bfe.s32 %r1, %r0, 28, 8;", -(2**31), -8),
        ("bfe.u32 %r1, %r0, 3, 0;", -1, 0),
        ("bfi.b32 %r1, %r0, 0, 8, 4;", 0x1F, 0xF00),
        ("popc.b32 %r1, %r0;", 0b1011, 3),
        ("clz.b32 %r1, %r0;", 1, 31),
        ("brev.b32 %r1, %r0;", 6, 6 << 28),
        ("add.s16x2 %r1, %r0, 0xffff0001;", 0x0003FFFF, 0x00020000),
        ("lop3.b32 %r1, %r0, 12, 5, 0xca;", 10, (10 & 12) | (~10 & 5)),
        ("prmt.b32 %r1, %r0, 0, 0x4012;", 0x11223344, 0x00443322 & 0xFFFFFFFF),
        ("prmt.b32 %r1, %r0, 0, 0xbbbb;", 0x7F000000 - 2**31, -1),
        ("shf.l.wrap.b32 %r1, %r0, 1, 8;", -(2**31) + 5, (1 << 8) | 0x80),
        ("cvt.s32.s16 %r1, %rs0;", 0xFFFE, -2),
        ("cvt.u32.u16 %r1, %rs0;", 0xFFFE, 0xFFFE),
        ("cvt.s64.s32 %rd10, %r0; shr.s64 %rd10, %rd10, 32; cvt.u32.u64 %r1, %rd10;", -2, -1),
        ("mov.b32 {%rs1, %rs2}, %r0; mov.b32 %r1, {%rs2, %rs1};", 0x00030004, 0x00040003),
        ("setp.lt.s32 %p1, %r0, 0; selp.b32 %r1, 7, 8, %p1;", -1, 7),
        ("setp.lt.u32 %p1, %r0, 1; selp.b32 %r1, 7, 8, %p1;", -1, 8),
        ("setp.ne.b32 %p1, %r0, 0; @!%p1 mov.b32 %r1, 3; @%p1 mov.b32 %r1, 4;", 1, 4),
        ("{ .reg .b32 %r0; mov.b32 %r0, 6; mov.b32 %r1, %r0; } add.s32 %r1, %r1, %r0;", 1, 7),
    ],
)
def test_integers(instruction, value, expected):
    assert unary(instruction, value) % 2**32 == expected % 2**32


@pytest.mark.parametrize(
    ("instruction", "value", "expected"),
    [
        ("add.f32 %r1, %r0, 0f3F800000;", 2**-24, 1.0),
        ("fma.rn.f32 %r1, %r0, %r0, 0fBF800000;", 1 + 2**-12, 2**-11 + 2**-24),
        ("mul.ftz.f32 %r1, %r0, 0f3F000000;", 2**-126, 0.0),
        ("mul.f32 %r1, %r0, 0f3F000000;", 2**-126, 2**-127),
        ("ex2.approx.ftz.f32 %r1, %r0;", 3.0, 8.0),
        ("rcp.approx.ftz.f32 %r1, %r0;", 4.0, 0.25),
        ("min.f32 %r1, %r0, 0f3F800000;", float("nan"), 1.0),
        ("min.NaN.f32 %r1, %r0, 0f3F800000;", float("nan"), float("nan")),
        ("setp.lt.f32 %p1, %r0, 0f3F800000; selp.f32 %r1, 0f40000000, 0f40400000, %p1;", float("nan"), 3.0),
        ("setp.ltu.f32 %p1, %r0, 0f3F800000; selp.f32 %r1, 0f40000000, 0f40400000, %p1;", float("nan"), 2.0),
        (
            "cvt.rn.f16x2.f32 %r2, %r0, 0f40000000; mov.b32 %r3, 0x40003C00;"  # halves (1, 2) against (2, x)
            "setp.lt.f16x2 %p1|%p2, %r3, %r2; selp.f32 %r1, 0f3F800000, 0f00000000, %p1;"
            "@%p2 add.f32 %r1, %r1, 0f40000000;",
            1.0,
            1.0,
        ),
        ("cvt.rzi.s32.f32 %r2, %r0; cvt.rn.f32.s32 %r1, %r2;", -2.75, -2.0),
        ("cvt.rni.s32.f32 %r2, %r0; cvt.rn.f32.s32 %r1, %r2;", 2.5, 2.0),
        ("cvt.rn.bf16.f32 %rs1, %r0; cvt.f32.bf16 %r1, %rs1;", 1 + 2**-8, 1.0),
        ("cvt.rn.f16.f32 %rs1, %r0; cvt.f32.f16 %r1, %rs1;", 1 + 2**-11 + 2**-20, 1 + 2**-10),
        ("cvt.rna.tf32.f32 %r1, %r0;", 1 + 2**-11, 1 + 2**-10),
        ("cvt.rn.bf16x2.f32 %r2, 0f00000000, %r0; shl.b32 %r1, %r2, 16;", 3.0, 3.0),
    ],
)
def test_floats(instruction, value, expected):
    assert unary(instruction, value, kind=torch.float32) == pytest.approx(expected, abs=0, rel=0, nan_ok=True)


ADDRESSES = "add.s64 %rd10, %rd0, %rd9;"


@every_schedule
def test_threads_part_and_meet_again(schedule):
    # thread t adds 1 + 2 + ... + t, odd threads double it; the shuffle after that takes the whole warp
    y = torch.zeros(64, dtype=torch.int32)
    body = f"""{ADDRESSES} mov.b32 %r1, 0; mov.b32 %r2, %r9;
        $loop: setp.eq.s32 %p1, %r2, 0; @%p1 bra $after; add.s32 %r1, %r1, %r2; sub.s32 %r2, %r2, 1; bra $loop;
        $after: and.b32 %r3, %r9, 1; setp.eq.s32 %p2, %r3, 0; @%p2 bra $even; add.s32 %r1, %r1, %r1;
        $even: shfl.sync.bfly.b32 %r4, %r1, 0, 31, -1; st.global.b32 [%rd10], %r4;"""
    assert run(body, y, threads=64, schedule=schedule).findings == []
    thread = torch.arange(64)
    assert torch.equal(y.long(), thread * (thread + 1) // 2 * (1 + thread % 2))


@every_schedule
def test_a_warp_meets_again_where_it_must_be_whole(schedule):
    # the odd threads' way lies behind the shuffle and the barrier
    y = torch.zeros(64, dtype=torch.int32)
    body = f"""{ADDRESSES} mov.b32 %r1, %r9; and.b32 %r2, %r9, 1; setp.eq.s32 %p1, %r2, 1; @%p1 bra $far;
        $near: shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; bar.sync 0; st.global.b32 [%rd10], %r3; bra $end;
        $far: add.s32 %r1, %r1, 100; bra $near; $end:"""
    assert run(body, y, threads=64, schedule=schedule).findings == []
    assert y.tolist() == [thread + 101 if thread % 2 == 0 else thread - 1 for thread in range(64)]


@pytest.mark.parametrize(
    ("mode", "amount", "limit", "source"),
    [
        ("idx", 5, 31, lambda lane: 5),
        ("bfly", 3, 31, lambda lane: lane ^ 3),
        ("up", 4, 0, lambda lane: lane - 4 if lane >= 4 else lane),
        ("down", 4, 31, lambda lane: lane + 4 if lane < 28 else lane),
        ("idx", 1, 0x181F, lambda lane: lane // 8 * 8 + 1),
    ],
)
def test_shuffles(mode, amount, limit, source):
    y = torch.zeros(32, dtype=torch.int32)
    body = f"{ADDRESSES} shfl.sync.{mode}.b32 %r1|%p1, %r9, {amount}, {limit}, -1; st.global.b32 [%rd10], %r1;"
    run(body, y)
    assert y.tolist() == [source(lane) for lane in range(32)]


def test_what_stops_an_execution():
    y = torch.zeros(31, dtype=torch.int32)
    with pytest.raises(OutOfBounds, match=r"a write of 4 bytes at byte 124 of buffer0 \(124 bytes\), in 1 lanes"):
        run(f"{ADDRESSES} st.global.b32 [%rd10], %r9;", y)
    with pytest.raises(OutOfBounds, match=r"a read of 4 bytes at byte -8 of buffer0"):
        run("ld.global.b32 %r1, [%rd0+-8];", y)
    with pytest.raises(OutOfBounds, match="which is in no argument"):
        run("mov.b64 %rd10, 64; ld.global.b32 %r1, [%rd10];", y)
    with pytest.raises(Misaligned, match=r"a read of 4 bytes at byte 2 of buffer0"):
        run("ld.global.b32 %r1, [%rd0+2];", y)
    with pytest.raises(Misaligned, match=r"a read of 16 bytes at byte 8 of buffer0"):
        run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];", y)
    with pytest.raises(OutOfBounds, match="a write of 4 bytes at 64 of 64 bytes of shared memory"):
        run("mov.b32 %r1, memory; st.shared.b32 [%r1+64], %r9;", y, shared=64)
    with pytest.raises(Misaligned, match="a write of 4 bytes at 6 of shared memory"):
        run("mov.b32 %r1, memory; st.shared.b32 [%r1+6], %r9;", y, shared=64)
    with pytest.raises(Unsupported, match=r"does not know the instruction `frob.b32 %r1, %r9`"):
        run("frob.b32 %r1, %r9;", y)
    with pytest.raises(Unsupported, match=r"does not know .sideways of the instruction `add.sideways.s32"):
        run("add.sideways.s32 %r1, %r9, 1;", y)
    with pytest.raises(Deadlock, match=r"a part of a warp executes `bar.sync 0`, which takes whole warps"):
        run("setp.lt.u32 %p1, %r9, 5; @%p1 bra $on; bar.sync 0; $on:", y)
    with pytest.raises(PtxError, match=r"a part of a warp executes `@%p1 shfl"):
        run("setp.lt.u32 %p1, %r9, 5; @%p1 shfl.sync.idx.b32 %r1, %r9, 7, 31, -1; bar.sync 0;", y)
    with pytest.raises(ValueError, match="occurs 1 times, there is no number 1"):
        without(module(""), "mul.wide.u32", 1)


def test_a_loop_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr("tests.gpu.ptx.machine.LIMIT", 1000)
    with pytest.raises(Deadlock, match="1000 steps and no end"):
        run("$on: bra $on;", torch.zeros(1))


def test_uninitialised_reads():
    y = torch.zeros(32, dtype=torch.int32)
    report = run(f"{ADDRESSES} setp.lt.u32 %p1, %r9, 5; @%p1 mov.b32 %r1, 1; st.global.b32 [%rd10], %r1;", y)
    assert "uninitialised: a read of register %r1 that is not written: `st.global" in str(report.findings[0])
    report = run(
        "mov.b32 %r1, memory; shl.b32 %r2, %r9, 2; add.s32 %r1, %r1, %r2; st.shared.b16 [%r1], %r9;"
        "ld.shared.b32 %r3, [%r1];",
        y,
        shared=128,
    )
    assert [str(finding.kind) for finding in report.findings] == ["uninitialised"]
    # the poison in place of what nobody has written
    assert y[:5].tolist() == [1] * 5 and not y[5:].eq(1).any()


OWN, NEXT = "shl.b32 %r1, %r9, 2;", "add.s32 %r2, %r9, 1; and.b32 %r2, %r2, 63; shl.b32 %r2, %r2, 2;"
HAND_ON = (
    f"{OWN} {NEXT} st.shared.b32 [%r1], %r9; SYNC ld.shared.b32 %r3, [%r2]; {ADDRESSES} st.global.b32 [%rd10], %r3;"
)


@every_schedule
@pytest.mark.parametrize(("sync", "kinds"), [("bar.sync 0;", set()), ("", {"race"}), ("bar.warp.sync -1;", {"race"})])
def test_races_in_shared_memory(sync, kinds, schedule):
    y = torch.zeros(64, dtype=torch.int32)
    report = run(HAND_ON.replace("SYNC", sync), y, threads=64, shared=256, schedule=schedule)
    assert report.kinds() - {"uninitialised"} == kinds
    if not kinds:
        assert y.tolist() == [(thread + 1) % 64 for thread in range(64)]


def test_a_warp_barrier_orders_a_warp():
    body = HAND_ON.replace("63", "31").replace("SYNC", "bar.warp.sync -1;")
    assert run(body, torch.zeros(32, dtype=torch.int32), shared=128).findings == []
    assert run(body.replace("bar.warp.sync -1;", ""), torch.zeros(32, dtype=torch.int32), shared=128).kinds() == {
        "race"
    }


def test_equal_stores_of_one_instruction_are_no_race():
    y = torch.zeros(64, dtype=torch.int32)
    body = "mov.b32 %r1, 0; mov.b32 %r2, {}; st.shared.b32 [%r1], %r2; st.global.b32 [%rd0], %r2;"
    assert run(body.format("5"), y, threads=64, shared=4).findings == []
    found = run(body.format("%r9"), y, threads=64, shared=4).findings
    assert [("shared memory" in str(finding), finding.kind) for finding in found] == [(True, "race"), (False, "race")]


@every_schedule
def test_races_in_global_memory(schedule):
    y = torch.zeros(64, dtype=torch.int32)
    next_ = f"{NEXT} cvt.u64.u32 %rd11, %r2; add.s64 %rd11, %rd0, %rd11; {ADDRESSES}"
    body = f"{next_} st.global.b32 [%rd10], %r9; SYNC ld.global.b32 %r3, [%rd11];"
    within = run(body.replace("SYNC", "bar.sync 0;"), y, threads=64, schedule=schedule)
    assert within.findings == []
    warp = body.replace("63", "31").replace("SYNC", "bar.warp.sync -1;")
    assert run(warp, torch.zeros(32, dtype=torch.int32), schedule=schedule).findings == []
    racing = run(body.replace("SYNC", ""), y, threads=64, schedule=schedule)
    assert "race: threads race in buffer0, no barrier between: `st.global" in str(racing.findings[0])
    mov = "mov.u32 %r9, %ctaid.x; mul.wide.u32 %rd9, %r9, 4;"
    blocks = run(body.replace("SYNC", "bar.sync 0;").replace(NEXT, mov + NEXT), y, grid=2, schedule=schedule)
    assert "race: blocks race in buffer0" in str(blocks.findings[0])


def test_more_blocks_than_run_together():
    y = torch.zeros(300, dtype=torch.int32)
    body = """mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd10, %r1, 4; add.s64 %rd10, %rd0, %rd10; setp.eq.u32 %p1, %r9, 0;
        @%p1 st.global.b32 [%rd10], %r1;"""
    assert run(body, y, grid=300).findings == [] and torch.equal(y, torch.arange(300, dtype=torch.int32))
    last = "setp.eq.and.u32 %p2, %r1, 299, %p1; @%p2 ld.global.b32 %r2, [%rd0];"  # what the first block wrote
    (found,) = run(body + last, y, grid=300).findings
    assert found.kind == "race" and "blocks race in buffer0, no barrier between: `@%p1 st.global" in str(found)


@every_schedule
def test_atomic_changes(schedule):
    total, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = "add.s64 %rd10, %rd1, %rd9; atom.global.add.u32 %r1, [%rd0], 1; st.global.b32 [%rd10], %r1;"
    report = run(body, total, seen, threads=64, schedule=schedule)
    assert report.findings == [] and total.item() == 64 and sorted(seen.tolist()) == list(range(64))
    assert run(f"{body} st.global.b32 [%rd0], %r9;", total, seen, threads=64, schedule=schedule).kinds() == {"race"}
    # in shared memory, after a barrier; two kinds of access without one race
    inner = f"""mov.b32 %r2, memory; mov.b32 %r3, 0; setp.eq.u32 %p1, %r9, 0; @%p1 st.shared.b32 [%r2], %r3; bar.sync 0;
        {ADDRESSES} atom.relaxed.cta.shared.add.u32 %r1, [%r2], 1; SYNC ld.shared.b32 %r4, [%r2];
        st.global.b32 [%rd10], %r4;"""
    two = run(inner.replace("SYNC", "bar.sync 0;"), seen, grid=2, threads=64, shared=4, schedule=schedule)
    assert two.findings == []
    assert seen.eq(64).all()
    assert run(inner.replace("SYNC", ""), seen, threads=64, shared=4, schedule=schedule).kinds() == {"race"}
    most = torch.zeros(1)
    run("cvt.rn.f32.u32 %r1, %r9; red.global.max.u32 [%rd0], %r1;", most, schedule=schedule)
    assert most.item() == 31


COPY = f"""{OWN} {ADDRESSES} cp.async.ca.shared.global [%r1], [%rd10], 4; cp.async.commit_group;
    WAIT ld.shared.b32 %r3, [%r1]; add.s64 %rd11, %rd1, %rd9; st.global.b32 [%rd11], %r3;"""


def test_asynchronous_copies():
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    assert run(COPY.replace("WAIT", "cp.async.wait_group 0;"), x, y, shared=128).findings == []
    assert torch.equal(x, y)
    for too_little in ("", "cp.async.wait_group 1;"):
        report = run(COPY.replace("WAIT", too_little), x, y, shared=128)
        assert "unwaited copy" in report.kinds()
        assert not torch.equal(x, y)
    # a source of 0 bytes fills with zeros and is not read
    short = COPY.replace("[%rd10], 4;", "[%rd10], 4, %r4;").replace("WAIT", "cp.async.wait_all;")
    choose = "setp.lt.u32 %p1, %r9, 20; selp.b32 %r4, 4, 0, %p1;"
    assert run(choose + short, x[:20].clone(), y, shared=128).findings == []
    assert y.tolist() == [*range(20), *[0] * 12]


def halves(matrix):
    """float16 [rows, 16] as int32 [rows, 8]."""
    return matrix.contiguous().view(torch.int32)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_mma_of_half_precision(kind, transposed):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    a, b, y = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.zeros(16, 8)
    stored = b.t().contiguous() if transposed else b
    # a [16, 16] from shared memory at 0 by rows of 32 bytes; b at 512 as [n, k] (32 bytes) or as [k, n] (16 bytes)
    by_n = (
        "and.b32 %r2, %r9, 7; shl.b32 %r2, %r2, 5; bfe.u32 %r3, %r9, 3, 1; shl.b32 %r3, %r3, 4; add.s32 %r2, %r2, %r3;"
    )
    by_k = "and.b32 %r2, %r9, 15; shl.b32 %r2, %r2, 4;"
    row_of_b, trans = (by_k, ".trans") if transposed else (by_n, "")
    body = f"""
        shl.b32 %r1, %r9, 4; mul.wide.u32 %rd10, %r9, 16; add.s64 %rd11, %rd0, %rd10; add.s64 %rd12, %rd1, %rd10;
        ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd11]; st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
        setp.lt.u32 %p1, %r9, 16; @%p1 ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd12];
        @%p1 st.shared.v4.b32 [%r1+512], {{%r2, %r3, %r4, %r5}}; bar.sync 0;
        and.b32 %r2, %r9, 15; shl.b32 %r2, %r2, 5; shr.u32 %r3, %r9, 4; shl.b32 %r3, %r3, 4; add.s32 %r2, %r2, %r3;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r2];
        {row_of_b}
        ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r14, %r15}}, [%r2+512];
        mov.b32 %r20, 0f3F800000; mov.b32 %r21, %r20; mov.b32 %r22, %r20; mov.b32 %r23, %r20;
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}},
            {{%r14, %r15}}, {{%r20, %r21, %r22, %r23}};
        shr.u32 %r1, %r9, 2; shl.b32 %r1, %r1, 5; and.b32 %r2, %r9, 3; shl.b32 %r2, %r2, 3; add.s32 %r1, %r1, %r2;
        cvt.u64.u32 %rd13, %r1; add.s64 %rd13, %rd2, %rd13;
        st.global.v2.b32 [%rd13], {{%r20, %r21}}; st.global.v2.b32 [%rd13+256], {{%r22, %r23}};"""
    assert run(body, halves(a), halves(stored), y, shared=1024).findings == []
    torch.testing.assert_close(y, a.float() @ b.float().t() + 1, rtol=1e-6, atol=1e-6)


def test_mma_of_tf32_drops_the_low_bits():
    a, b, y = torch.randn(16, 8), torch.randn(8, 8), torch.zeros(16, 8)
    # lane 4 g + t: a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4); b0 (t, g), b1 (t + 4, g), b as [n, k]
    body = """
        shr.u32 %r1, %r9, 2; and.b32 %r2, %r9, 3; shl.b32 %r3, %r1, 3; add.s32 %r3, %r3, %r2;
        mul.wide.u32 %rd10, %r3, 4;
        add.s64 %rd11, %rd0, %rd10; add.s64 %rd12, %rd1, %rd10;
        ld.global.b32 %r10, [%rd11]; ld.global.b32 %r11, [%rd11+256]; ld.global.b32 %r12, [%rd11+16];
        ld.global.b32 %r13, [%rd11+272]; ld.global.b32 %r14, [%rd12]; ld.global.b32 %r15, [%rd12+16];
        mov.b32 %r20, 0; mov.b32 %r21, %r20; mov.b32 %r22, %r20; mov.b32 %r23, %r20;
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13},
            {%r14, %r15}, {%r20, %r21, %r22, %r23};
        shl.b32 %r1, %r1, 5; shl.b32 %r2, %r2, 3; add.s32 %r1, %r1, %r2; cvt.u64.u32 %rd13, %r1;
        add.s64 %rd13, %rd2, %rd13; st.global.v2.b32 [%rd13], {%r20, %r21};
        st.global.v2.b32 [%rd13+256], {%r22, %r23};"""
    run(body, a, b, y)
    truncated = [(x.view(torch.int32) & -(1 << 13)).view(torch.float32).double() for x in (a, b)]
    torch.testing.assert_close(y.double(), truncated[0] @ truncated[1].t(), rtol=1e-6, atol=1e-6)


# Each lane's registers lie together: a and b four, the metadata one, and the results four.
MMA_SP = """
    mul.wide.u32 %rd10, %r9, 16; add.s64 %rd11, %rd0, %rd10; add.s64 %rd12, %rd1, %rd10; add.s64 %rd13, %rd2, %rd9;
    add.s64 %rd14, %rd3, %rd10;
    ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd11]; ld.global.v4.b32 {{%r14, %r15, %r16, %r17}}, [%rd12];
    ld.global.b32 %r18, [%rd13]; mov.b32 %r20, 0f3F800000; mov.b32 %r21, %r20; mov.b32 %r22, %r20; mov.b32 %r23, %r20;
    mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 {{%r20, %r21, %r22, %r23}},
        {{%r10, %r11, %r12, %r13}}, {{%r14, %r15, %r16, %r17}}, {{%r20, %r21, %r22, %r23}}, %r18, {selector};
    st.global.v4.b32 [%rd14], {{%r20, %r21, %r22, %r23}};"""


def sparse_fragments(a, b, selector):
    """(a [16, 32], two of each four; b [32, 8]) as the lanes hold them, entry by entry from the manual's definition."""
    kept, dense = torch.zeros(32, 4, 2, dtype=a.dtype), torch.zeros(32, 4, 2, dtype=a.dtype)
    metadata = torch.full((32,), 0x7FFFFFFF, dtype=torch.int64)
    for lane in range(32):
        group_id, thread = divmod(lane, 4)
        for register in range(4):
            row, first = group_id + 8 * (register % 2), 4 * thread + 16 * (register // 2)
            columns = [first + i for i in range(4) if a[row, first + i] != 0]
            kept[lane, register] = a[row, columns]
            for i in range(2):
                dense[lane, register, i] = b[8 * register + 2 * thread + i, group_id]
        if thread // 2 == selector:
            metadata[lane] = 0
            for chunk in range(4):
                for bit, row in ((0, group_id), (16, group_id + 8)):
                    first = 16 * (thread % 2) + 4 * chunk
                    low, high = (i for i in range(4) if a[row, first + i] != 0)
                    metadata[lane] |= (low + 4 * high) << (bit + 4 * chunk)
    return kept.view(torch.int32), dense.view(torch.int32), metadata.to(torch.uint32).view(torch.int32)


def two_of_four(dtype):
    a, kept = torch.randn(16, 8, 4), torch.rand(16, 8, 4).argsort(2) < 2
    return (torch.where(a.abs() < 0.01, 1.0, a) * kept).view(16, 32).to(dtype)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("selector", [0, 1])
def test_mma_of_two_of_four(kind, selector):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    a, b, y = two_of_four(dtype), torch.randn(32, 8).to(dtype), torch.zeros(32, 4)
    kept, dense, metadata = sparse_fragments(a, b, selector)
    body = MMA_SP.format(kind=kind, selector=selector)
    assert run(body, kept, dense, metadata, y).findings == []
    expected = a.double() @ b.double() + 1
    for lane in range(32):
        for i in range(4):
            entry = expected[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2].item()
            assert y[lane, i].item() == pytest.approx(entry, rel=1e-6, abs=1e-5)
    # what is not kept is not multiplied; what is kept is
    (unused,) = (a[0] == 0).nonzero()[0].tolist()
    b[unused, 0] = float("inf")
    run(body, kept, sparse_fragments(a, b, selector)[1], metadata, y)
    assert y[0, 0].item() == pytest.approx(expected[0, 0].item(), rel=1e-6, abs=1e-5)
    assert y[:, 0].isinf().any()


def test_metadata_that_means_nothing_is_found():
    a, b, y = two_of_four(torch.float16), torch.randn(32, 8).half(), torch.zeros(32, 4)
    kept, dense, metadata = sparse_fragments(a, b, 0)
    for wrong in (0b0000, 0b0101, 0b0001):  # twice the same column, and two that are not in order
        broken = metadata.clone()
        broken[5] = (broken[5] & ~15) | wrong
        assert run(MMA_SP.format(kind="f16", selector=0), kept, dense, broken, y).kinds() == {"metadata"}
        assert run(MMA_SP.format(kind="f16", selector=1), kept, dense, sparse_fragments(a, b, 1)[2], y).findings == []
    for other in (MMA_SP.replace("::ordered_metadata", ""), MMA_SP.replace("m16n8k32", "m16n8k16")):
        with pytest.raises(Unsupported, match="the instruction"):
            run(other.format(kind="f16", selector=0), kept, dense, metadata, y)
    with pytest.raises(Unsupported, match="the instruction"):
        run(MMA_SP.format(kind="f16", selector=2), kept, dense, metadata, y)


# Core matrices of 8 rows x 16 bytes lie whole: those of a at 128 (m + 8 k), of b at 2048 + 128 (n + 2 k), m, n and k in
# units of 8 numbers. A descriptor has the address, the distance along k (bit 16) and along the rows (bit 32), / 16.
WGMMA = """
    shl.b32 %r1, %r9, 4; mul.wide.u32 %rd10, %r9, 16; add.s64 %rd11, %rd0, %rd10; add.s64 %rd12, %rd1, %rd10;
    ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd11]; st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};
    setp.lt.u32 %p1, %r9, 32; @%p1 ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd12];
    @%p1 st.shared.v4.b32 [%r1+2048], {%r2, %r3, %r4, %r5};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b32 %acc0, 0f3F800000; mov.b32 %acc1, %acc0; mov.b32 %acc2, %acc0; mov.b32 %acc3, %acc0;
    mov.b32 %acc4, %acc0; mov.b32 %acc5, %acc0; mov.b32 %acc6, %acc0; mov.b32 %acc7, %acc0;
    mov.b64 %rd13, 0x0000000800400000; mov.b64 %rd14, 0x0000000800100080; mov.pred %p2, 1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%acc0, %acc1, %acc2, %acc3, %acc4, %acc5, %acc6, %acc7},
        %rd13, %rd14, %p2, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    bar.sync 0;
    st.shared.b32 [%r1], %r9;
    shr.u32 %r6, %r9, 2; shr.u32 %r7, %r9, 5; shl.b32 %r7, %r7, 3; add.s32 %r6, %r6, %r7; shl.b32 %r6, %r6, 6;
    and.b32 %r7, %r9, 3; shl.b32 %r7, %r7, 3; add.s32 %r6, %r6, %r7; cvt.u64.u32 %rd15, %r6; add.s64 %rd15, %rd2, %rd15;
    st.global.v2.b32 [%rd15], {%acc0, %acc1}; st.global.v2.b32 [%rd15+512], {%acc2, %acc3};
    st.global.v2.b32 [%rd15+32], {%acc4, %acc5}; st.global.v2.b32 [%rd15+544], {%acc6, %acc7};"""


def multiply(text, schedule):
    a, b, y = torch.randn(64, 16).half(), torch.randn(16, 16).half(), torch.zeros(64, 16)

    def cores(matrix):
        return halves(matrix.view(-1, 8, 2, 8).permute(2, 0, 1, 3))

    report = run(text, cores(a), cores(b), y, threads=128, shared=2560, schedule=schedule)
    return report, np.abs((y - (a.float() @ b.float().t() + 1)).numpy()).max()


@every_schedule
def test_products_of_a_warpgroup(schedule):
    report, error = multiply(WGMMA, schedule)
    assert report.findings == [] and error < 1e-5


@every_schedule
@pytest.mark.parametrize(
    ("removed", "kind"),
    [
        ("wgmma.wait_group.sync.aligned 0;", "unwaited product"),
        ("wgmma.fence.sync.aligned;", "missing fence"),
        ("fence.proxy.async.shared::cta;", "missing fence"),
        ("bar.sync 0;", "race"),
    ],
)
def test_what_is_missing_around_a_product_is_found(removed, kind, schedule):
    assert kind in multiply(WGMMA.replace(removed, "", 1), schedule)[0].kinds()


def test_traffic():
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    # all lanes of a warp ask for one number, twice; then each writes its own
    body = """add.s64 %rd10, %rd1, %rd9; ld.global.b32 %r1, [%rd0]; ld.global.b32 %r2, [%rd0];
        st.global.b32 [%rd10], %r1;"""
    launch = run(body, x, y, threads=64).launches[0]
    assert (launch.traffic["buffer0"].read, launch.traffic["buffer0"].distinct) == (16, 4)
    assert (launch.traffic["buffer1"].total, launch.traffic["buffer1"].distinct_written) == (256, 256)
    assert launch.instructions["st"] == 2
    # views of one tensor are one buffer
    both = run(body, x[:32], x[16:], threads=32).launches[0].traffic
    assert list(both) == ["buffer0=buffer1"]
