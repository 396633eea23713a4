"""Layouts of tensor-core instructions as tables, compared with the emulator: the elements of each lane, and the
positions of a tile in shared memory for descriptors and swizzles.

The tables were once compared with CuTe's layouts; they do not use the emulator's own functions.
"""

import itertools

import pytest
import torch

from emulator import Emulator

LANES = range(32)

PROGRAM = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry program(.param .u64 program_out, .param .u64 program_in, .param .u64 program_image,
                        .param .u64 program_descriptor)
{{
  .shared .align 1024 .b8 tile[32768];
  .reg .b64 %out, %in, %image, %descriptor, %offset, %address;
  .reg .b32 %tid, %tile, %word, %i, %laneid_x;
  .reg .b32 %r<16>;
  .reg .b16 %h<4>;
  .reg .f32 %f<16>;
  .reg .pred %p<4>;
  ld.param.u64 %out, [program_out];
  ld.param.u64 %in, [program_in];
  ld.param.u64 %image, [program_image];
  ld.param.u64 %descriptor, [program_descriptor];
  mov.u32 %tid, %tid.x;
  mad.wide.u32 %out, %tid, 32, %out;
  mad.wide.u32 %in, %tid, 32, %in;
  mov.u32 %tile, tile;
  mov.u32 %i, 0;
COPY:
  // 128 threads, or 32 that go round four times as often.
  mov.u32 %r0, %ntid.x;
  mad.lo.u32 %r1, %i, %r0, %tid;
  shl.b32 %r1, %r1, 2;
  cvt.u64.u32 %address, %r1;
  add.u64 %address, %image, %address;
  ld.global.u32 %word, [%address];
  add.u32 %r2, %tile, %r1;
  st.shared.u32 [%r2], %word;
  add.u32 %i, %i, 1;
  mul.lo.u32 %r3, %i, %r0;
  setp.lt.u32 %p0, %r3, 8192;
  @%p0 bra COPY;
  fence.proxy.async;
  bar.sync 0;
  shr.u32 %r4, %tile, 4;
  cvt.u64.u32 %offset, %r4;
  add.u64 %descriptor, %descriptor, %offset;
  {body}
  ret;
}}
"""


def run(body, registers, image=None, descriptor=0, threads=32):
    """Eight 32-bit words per thread, which the body writes to [%out]; `registers` are at [%in]."""
    emu = Emulator()
    out = emu.empty((threads, 8), torch.int32, name="out")
    given = torch.zeros(threads, 8, dtype=torch.int32)
    given[:, : registers.shape[1]] = registers
    image = torch.zeros(16384, dtype=torch.float16) if image is None else image
    tensors = emu.tensor(given, name="in"), emu.tensor(image, name="image")
    emu.run_ptx(PROGRAM.format(body=body), "program", 1, threads, (out, *tensors, descriptor))
    emu.assert_clean()
    return out.cpu()


def pack(low, high):
    """Two 16-bit elements in one register."""
    bits = torch.stack([low, high], -1).view(torch.int16).to(torch.int32)
    return (bits[..., 0] & 0xFFFF) | (bits[..., 1] << 16)


def unpack(words, dtype=torch.float16):
    """(..., 2) elements of registers, the low one first."""
    return words.contiguous().view(torch.int16).view(dtype).reshape(*words.shape, 2)


def integers(*shape, dtype=torch.float16):
    """Whole numbers, whose sums of products are exact."""
    return torch.randint(-4, 5, shape).to(dtype)


# ---- mma. Lane l has g = l // 4 and c = l % 4.


def mma_a(lane, register, half):
    return lane // 4 + 8 * (register & 1), 2 * (lane % 4) + half + 8 * (register >> 1)


def mma_b(lane, register, half):
    return 2 * (lane % 4) + half + 8 * register, lane // 4


def mma_d(lane, register):
    return lane // 4 + 8 * (register >> 1), 2 * (lane % 4) + (register & 1)


def fragment(matrix, place, count):
    """The registers of all lanes, two elements each."""
    rows = [[[matrix[place(lane, r, half)] for half in (0, 1)] for r in range(count)] for lane in LANES]
    elements = torch.tensor(rows).to(matrix.dtype)
    return pack(elements[..., 0], elements[..., 1])


def gather(words, place, shape):
    """The matrix of which each lane holds float32 registers."""
    matrix = torch.full(shape, float("nan"))
    values = words.contiguous().view(torch.float32)
    for lane, register in itertools.product(range(words.shape[0]), range(values.shape[1])):
        matrix[place(lane, register)] = values[lane, register]
    return matrix


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [8, 16])
def test_mma(dtype, depth):
    a, b, c = integers(16, depth, dtype=dtype), integers(depth, 8, dtype=dtype), integers(16, 8).float()
    registers = torch.cat([fragment(a, mma_a, depth // 4), fragment(b, mma_b, depth // 8)], 1)
    name = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    a_list, b_list = ("%r0, %r1, %r2, %r3", "%r4, %r5") if depth == 16 else ("%r0, %r1", "%r2")
    body = f"""
  ld.global.v4.u32 {{%r0, %r1, %r2, %r3}}, [%in];
  ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%in+16];
  mov.f32 %f0, 0f00000000;
  mma.sync.aligned.m16n8k{depth}.row.col.f32.{name}.{name}.f32 {{%f0, %f1, %f2, %f3}}, {{{a_list}}}, {{{b_list}}},
      {{%f0, %f0, %f0, %f0}};
  st.global.v4.f32 [%out], {{%f0, %f1, %f2, %f3}};
"""
    result = gather(run(body, registers)[:, :4], mma_d, (16, 8))
    assert torch.equal(result, a.float() @ b.float())
    # The accumulator has the layout of the result.
    start = torch.stack([torch.stack([c[mma_d(lane, r)] for r in range(4)]) for lane in LANES])
    body = f"""
  ld.global.v4.u32 {{%r0, %r1, %r2, %r3}}, [%in];
  mov.u32 %r8, 0;
  mov.b32 %f0, %r0;
  mov.b32 %f1, %r1;
  mov.b32 %f2, %r2;
  mov.b32 %f3, %r3;
  mma.sync.aligned.m16n8k8.row.col.f32.{name}.{name}.f32 {{%f0, %f1, %f2, %f3}}, {{%r8, %r8}}, {{%r8}},
      {{%f0, %f1, %f2, %f3}};
  st.global.v4.f32 [%out], {{%f0, %f1, %f2, %f3}};
"""
    assert torch.equal(gather(run(body, start.view(torch.int32))[:, :4], mma_d, (16, 8)), c)


def test_mma_with_sums_in_half_precision():
    a, b = integers(16, 16), integers(16, 8)
    registers = torch.cat([fragment(a, mma_a, 4), fragment(b, mma_b, 2)], 1)
    body = """
  ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%in];
  ld.global.v2.u32 {%r4, %r5}, [%in+16];
  mov.u32 %r8, 0;
  mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r6, %r7}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r8, %r8};
  st.global.v2.u32 [%out], {%r6, %r7};
"""
    elements = unpack(run(body, registers)[:, :2])
    expected = a.float() @ b.float()
    for lane, register, half in itertools.product(LANES, range(2), range(2)):
        assert elements[lane, register, half] == expected[mma_d(lane, 2 * register + half)]


def test_mma_tf32():
    a, b = integers(16, 8).float() / 8, integers(8, 8).float() / 8
    a_lanes = [[a[lane // 4 + 8 * (r & 1), lane % 4 + 4 * (r >> 1)] for r in range(4)] for lane in LANES]
    b_lanes = [[b[lane % 4 + 4 * r, lane // 4] for r in range(2)] for lane in LANES]
    registers = torch.cat([torch.tensor(a_lanes), torch.tensor(b_lanes)], 1).view(torch.int32)
    body = """
  ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%in];
  ld.global.v2.u32 {%r4, %r5}, [%in+16];
  mov.f32 %f0, 0f00000000;
  mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, {%r4, %r5},
      {%f0, %f0, %f0, %f0};
  st.global.v4.f32 [%out], {%f0, %f1, %f2, %f3};
"""
    assert torch.equal(gather(run(body, registers)[:, :4], mma_d, (16, 8)), a @ b)


# ---- ldmatrix, stmatrix, movmatrix


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    image = torch.arange(16384).to(torch.int16).view(torch.float16)
    rows = torch.randperm(64)[:32]  # in units of 16 bytes: lane l addresses row l % 8 of matrix l // 8
    targets = ", ".join(f"%r{4 + m}" for m in range(count))
    stores = "\n".join(f"  st.global.u32 [%out+{4 * m}], %r{4 + m};" for m in range(count))
    body = f"""
  ld.global.u32 %r0, [%in];
  shl.b32 %r0, %r0, 4;
  add.u32 %r0, %r0, %tile;
  ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{targets}}}, [%r0];
{stores}
"""
    elements = unpack(run(body, rows[:, None].to(torch.int32), image)[:, :count], torch.int16)
    for lane, matrix, half in itertools.product(LANES, range(count), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + half
        if transposed:
            row, column = column, row
        assert elements[lane, matrix, half] == 8 * rows[8 * matrix + row] + column


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_is_the_inverse_of_ldmatrix(count, transposed):
    trans = ".trans" if transposed else ""
    registers = ", ".join(f"%r{4 + m}" for m in range(count))
    loaded = ", ".join(f"%r{8 + m}" for m in range(count))
    stores = "\n".join(f"  st.global.u32 [%out+{4 * m}], %r{8 + m};" for m in range(count))
    body = f"""
  ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%in];
  shl.b32 %r0, %tid, 4;
  add.u32 %r0, %r0, %tile;
  stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r0], {{{registers}}};
  bar.warp.sync 0xffffffff;
  ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{loaded}}}, [%r0];
{stores}
"""
    given = torch.randint(-(2**31), 2**31 - 1, (32, 4)).to(torch.int32)
    assert torch.equal(run(body, given)[:, :count], given[:, :count])


def test_movmatrix():
    body = """
  ld.global.u32 %r0, [%in];
  movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;
  st.global.u32 [%out], %r1;
"""
    matrix = torch.arange(64).to(torch.int16).reshape(8, 8)
    given = torch.stack([pack(matrix[l // 4, 2 * (l % 4)], matrix[l // 4, 2 * (l % 4) + 1]) for l in LANES])  # noqa: E741
    elements = unpack(run(body, given[:, None])[:, 0], torch.int16)
    for lane, half in itertools.product(LANES, range(2)):
        assert elements[lane, half] == matrix[2 * (lane % 4) + half, lane // 4]


# ---- wgmma


def wgmma_d(thread, register):
    warp, lane = divmod(thread, 32)
    return 16 * warp + lane // 4 + 8 * (register >> 1 & 1), 8 * (register >> 2) + 2 * (lane % 4) + (register & 1)


def swizzle(address, width):
    return address ^ (address >> 3 & {128: 0x70, 64: 0x30, 32: 0x10, 0: 0}[width])


def element_offset(m, k, width, leading, stride, k_major):
    """The byte offset of element (m, k) in the tile, before swizzling; m is a row of A or a column of B."""
    if width == 0 and k_major:
        return m // 8 * stride + m % 8 * 16 + k // 8 * leading + 2 * (k % 8)
    if width == 0:
        return m // 8 * stride + 2 * (m % 8) + k % 8 * 16 + k // 8 * leading
    if k_major:
        return m // 8 * stride + m % 8 * width + 2 * k
    run = width // 2
    return m // run * leading + 2 * (m % run) + k % 8 * width + k // 8 * stride


def operand(image, rows, width, leading, stride, k_major, start):
    """The (rows, 16) operand that a descriptor finds in shared memory; the tile begins at a multiple of 1024."""
    places = [
        [swizzle(start + element_offset(m, k, width, leading, stride, k_major), width) // 2 for k in range(16)]
        for m in range(rows)
    ]
    return image[torch.tensor(places)].float()


def descriptor(width, leading, stride, start):
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


A_IN_REGISTERS = """
  ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%in];
  mov.f32 %f0, 0f00000000;
  mov.f32 %f1, %f0;
  mov.f32 %f2, %f0;
  mov.f32 %f3, %f0;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%f0, %f1, %f2, %f3}}, {{%r4, %r5, %r6, %r7}}, %descriptor,
      0, 1, {sign}, {transposed};
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  st.global.v4.f32 [%out], {{%f0, %f1, %f2, %f3}};
"""
# B, without swizzle, lies at byte 24576.
A_IN_SHARED_MEMORY = """
  .reg .b64 %b;
  add.u32 %r5, %tile, 24576;
  shr.u32 %r5, %r5, 4;
  cvt.u64.u32 %b, %r5;
  or.b64 %b, %b, {b_descriptor};
  mov.f32 %f0, 0f00000000;
  mov.f32 %f1, %f0;
  mov.f32 %f2, %f0;
  mov.f32 %f3, %f0;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%f0, %f1, %f2, %f3}}, %descriptor, %b, 0, 1, 1, {transposed}, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  st.global.v4.f32 [%out], {{%f0, %f1, %f2, %f3}};
"""
# width, leading, stride, start of the tile. K-major tiles of one pattern are advanced by 32 bytes for the next k16.
K_MAJOR = [
    (0, 128, 256, 0),
    (0, 1024, 128, 0),
    (128, 16, 1024, 0),
    (128, 16, 1024, 96),
    (64, 16, 512, 32),
    (32, 16, 256, 0),
]
MN_MAJOR = [(0, 128, 256, 0), (128, 8192, 1024, 2048), (64, 1024, 2048, 0), (32, 512, 2048, 0)]
FORMS = [(True, *form) for form in K_MAJOR] + [(False, *form) for form in MN_MAJOR]


@pytest.mark.parametrize(("k_major", "width", "leading", "stride", "start"), FORMS)
def test_wgmma_with_a_in_shared_memory(k_major, width, leading, stride, start):
    image = integers(16384)
    a = operand(image, 64, width, leading, stride, k_major, start)
    b = operand(image, 8, 0, 128, 256, True, 24576)
    body = A_IN_SHARED_MEMORY.format(b_descriptor=descriptor(0, 128, 256, 0), transposed=int(not k_major))
    out = run(
        body, torch.zeros(128, 1, dtype=torch.int32), image, descriptor(width, leading, stride, start), threads=128
    )
    assert torch.equal(gather(out[:, :4], wgmma_d, (64, 8)), a @ b.T)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("k_major", "width", "leading", "stride", "start"), FORMS)
def test_wgmma_with_a_in_registers(k_major, width, leading, stride, start, sign):
    image, a = integers(16384), integers(64, 16)
    b = operand(image, 8, width, leading, stride, k_major, start)
    registers = torch.cat([fragment(a[16 * warp : 16 * warp + 16], mma_a, 4) for warp in range(4)])
    body = A_IN_REGISTERS.format(sign=sign, transposed=int(not k_major))
    out = run(body, registers, image, descriptor(width, leading, stride, start), threads=128)
    assert torch.equal(gather(out[:, :4], wgmma_d, (64, 8)), sign * a.float() @ b.T)


# ---- bulk copies of tensors

BULK = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry program(.param .u64 program_out, .param .align 64 .b8 program_map[128],
                        .param .align 4 .b8 program_numbers[24])
{{
  .shared .align 1024 .b8 tile[16384];
  .shared .align 8 .b64 full;
  .reg .b64 %map, %out, %address;
  .reg .b32 %tid, %tile, %full, %bytes, %i, %at, %word, %c<5>;
  .reg .pred %first, %again, %done;
  ld.param.u64 %out, [program_out];
  mov.b64 %map, program_map;
  ld.param.u32 %bytes, [program_numbers];
  ld.param.u32 %c0, [program_numbers+4];
  ld.param.u32 %c1, [program_numbers+8];
  ld.param.u32 %c2, [program_numbers+12];
  ld.param.u32 %c3, [program_numbers+16];
  ld.param.u32 %c4, [program_numbers+20];
  mov.u32 %tid, %tid.x;
  mov.u32 %tile, tile;
  mov.u32 %full, full;
  setp.eq.u32 %first, %tid, 0;
  {body}
}}
"""
LOAD = """
  @%first mbarrier.init.shared::cta.b64 [%full], 1;
  @%first fence.mbarrier_init.release.cluster;
  bar.sync 0;
  @%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [%full], %bytes;
  @%first cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
      [%tile], [%map, {{{coordinates}}}], [%full];
WAIT:
  mbarrier.try_wait.parity.shared::cta.b64 %done, [%full], 0;
  @!%done bra WAIT;
  shl.b32 %i, %tid, 2;
COPY:
  setp.ge.u32 %again, %i, %bytes;
  @%again ret;
  add.u32 %at, %tile, %i;
  ld.shared.u32 %word, [%at];
  cvt.u64.u32 %address, %i;
  add.u64 %address, %out, %address;
  st.global.u32 [%address], %word;
  add.u32 %i, %i, 128;
  bra COPY;
"""
STORE = """
  shl.b32 %i, %tid, 2;
COPY:
  add.u32 %at, %tile, %i;
  cvt.u64.u32 %address, %i;
  add.u64 %address, %out, %address;
  ld.global.u32 %word, [%address];
  st.shared.u32 [%at], %word;
  add.u32 %i, %i, 128;
  setp.lt.u32 %again, %i, %bytes;
  @%again bra COPY;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  @%first {instruction}.tensor.{rank}d.global.shared::cta{add}.tile.bulk_group [%map, {{{coordinates}}}], [%tile];
  @%first cp.async.bulk.commit_group;
  @%first cp.async.bulk.wait_group 0;
  ret;
"""


class Box:
    """A box of a tensor of 32-bit numbers, and the program that copies it."""

    def __init__(self, sizes, box, corner, swizzle):
        self.sizes, self.box, self.corner, self.swizzle = sizes, box, corner, swizzle  # outermost dimension first
        self.emu = Emulator(schedule="random")
        self.tensor = torch.arange(1.0, 1 + torch.Size(sizes).numel()).reshape(sizes)
        self.count = torch.Size(box).numel()

    def run(self, body, writable, buffer):
        tensor = self.emu.tensor(self.tensor, name="tensor", writable=writable)
        strides = [4 * stride for stride in self.tensor.stride()[:-1]]
        tensor_map = self.emu._host.tensor_map(
            tensor.data_ptr(), 4, self.sizes[::-1], strides[::-1], self.box[::-1], self.swizzle
        )
        corner = [*self.corner[::-1], 0, 0, 0, 0][:5]
        numbers = b"".join((n % 2**32).to_bytes(4, "little") for n in (4 * self.count, *corner))
        rank = len(self.sizes)
        text = (
            BULK.format(body=body)
            .replace("RANK", str(rank))
            .replace("COORDINATES", ", ".join(f"%c{i}" for i in range(rank)))
        )
        self.emu.run_ptx(text, "program", 1, 32, (buffer, tensor_map, numbers))
        self.emu.assert_clean()
        return tensor.cpu()

    def elements(self):
        """Every element of the box: its position in the tensor (None: outside) and in shared memory, in words."""
        for number, index in enumerate(itertools.product(*map(range, self.box))):
            place = tuple(c + i for c, i in zip(self.corner, index, strict=True))
            inside = all(0 <= p < size for p, size in zip(place, self.sizes, strict=True))
            yield place if inside else None, swizzle(4 * number, self.swizzle) // 4


BOXES = [
    ([64], [32], [-4], 0),
    ([40, 64], [16, 32], [8, 16], 128),
    ([40, 64], [16, 32], [32, -8], 128),
    ([40, 64], [64, 16], [-3, 52], 64),
    ([5, 7, 12], [2, 8, 8], [4, -1, 8], 32),
    ([2, 3, 5, 8], [1, 2, 4, 8], [1, 2, 3, 0], 0),
    ([2, 2, 2, 3, 8], [2, 1, 2, 2, 8], [0, 1, 1, 2, 0], 32),
]


@pytest.mark.parametrize(("sizes", "box", "corner", "width"), BOXES)
def test_bulk_load(sizes, box, corner, width):
    copy = Box(sizes, box, corner, width)
    out = copy.emu.empty((copy.count,), torch.float32, name="out")
    copy.run(LOAD.format(rank="RANK", coordinates="COORDINATES"), False, out)
    words = out.cpu()
    for place, word in copy.elements():
        assert words[word] == (0 if place is None else copy.tensor[place])


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("sizes", "box", "corner", "width"), BOXES)
def test_bulk_store(sizes, box, corner, width, add):
    copy = Box(sizes, box, corner, width)
    given = torch.randint(0, 100, (copy.count,)).float()
    instruction = "cp.reduce.async.bulk" if add else "cp.async.bulk"
    body = STORE.format(instruction=instruction, add=".add" if add else "", rank="RANK", coordinates="COORDINATES")
    result = copy.run(body, True, copy.emu.tensor(given, name="given"))
    expected = copy.tensor.clone()
    for place, word in copy.elements():
        if place is not None:
            expected[place] = given[word] + (expected[place] if add else 0)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"address": 8}, "address must be a multiple of 16"),
        ({"byte_strides": [100]}, "stride 0 is 100 bytes"),
        ({"box": [512, 1]}, "box 0 is 512"),
        ({"box": [3, 1]}, "12 bytes wide, must be a multiple of 16"),
        ({"swizzle": 32}, "64 bytes wide, more than its swizzle"),
        ({"sizes": [0, 4]}, "size 0 is 0"),
    ],
)
def test_tensor_maps_that_a_driver_refuses(changes, reason):
    good = {"address": 4096, "element_bytes": 4, "sizes": [64, 4], "byte_strides": [256], "box": [16, 2], "swizzle": 64}
    encode = Emulator()._host.tensor_map
    assert len(encode(*good.values())) == 128
    with pytest.raises(ValueError, match=reason):
        encode(*(good | changes).values())


# ---- shuffles


def shuffle_source(mode, lane, b, clamp, segment):
    """The lane that is read; None if the lane keeps its own value."""
    last = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        return lane - b if lane - b >= last else None
    source = {"down": lane + b, "bfly": lane ^ b, "idx": (lane & segment) | (b & ~segment & 31)}[mode]
    return source if source <= last else None


@pytest.mark.parametrize("segment_bits", [0, 0b11000])
@pytest.mark.parametrize(
    ("mode", "clamp"), [("up", 0), ("down", 31), ("bfly", 31), ("idx", 31), ("down", 5), ("idx", 3)]
)
def test_shuffle(mode, clamp, segment_bits):
    for b in (0, 1, 5, 17):
        body = f"""
  shfl.sync.{mode}.b32 %r4|%p1, %tid, {b}, {clamp | segment_bits << 8}, 0xffffffff;
  selp.u32 %r5, 1, 0, %p1;
  st.global.v2.u32 [%out], {{%r4, %r5}};
"""
        out = run(body, torch.zeros(32, 1, dtype=torch.int32))
        for lane in LANES:
            source = shuffle_source(mode, lane, b, clamp, segment_bits)
            assert out[lane, 0] == (lane if source is None else source)
            assert out[lane, 1] == (source is not None)
