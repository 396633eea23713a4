// ldmatrix, stmatrix, movmatrix and mma.sync.
#include "matrix.h"

#include "decode.h"
#include "numbers.h"

namespace emulator {
namespace {

// All lanes must take part, also those whose operands are not used.
bool whole_warp(Execution& x, const Instruction& i) {
  if (!x.gather_warp(i)) return false;
  if (x.warp->launched != kAllLanes) x.report("divergence", i, "a matrix instruction needs all 32 lanes of the warp");
  return true;
}

// Lane l < 8 * count addresses row l % 8 of matrix l / 8.
bool matrix_rows(Execution& x, const Instruction& i, const Operand& address, int count, Kind kind,
                 std::uint8_t** rows) {
  bool complete = true;
  for (int lane = 0; lane < 8 * count; ++lane) {
    rows[lane] = x.access(x.site(i, lane), Space::kShared, x.shared_offset(i, address, lane), 16, kind, nullptr);
    complete &= rows[lane] != nullptr;
  }
  return complete;
}

std::uint16_t element(const std::uint8_t* row, int column) {
  std::uint16_t bits;
  std::memcpy(&bits, row + 2 * column, 2);
  return bits;
}

// option: number of matrices, transposed
Step load_matrix(Execution& x, const Instruction& i) {
  if (!whole_warp(x, i)) return Step::kStay;
  std::uint8_t* rows[kLanes];
  const int count = i.option[0];
  const bool transposed = i.option[1];
  if (!matrix_rows(x, i, i.operands[1], count, Kind::kRead, rows)) return Step::kNext;
  for (int matrix = 0; matrix < count; ++matrix) {
    alignas(64) std::uint32_t result[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const Place low = ldmatrix_element(lane, 0, transposed), high = ldmatrix_element(lane, 1, transposed);
      result[lane] = element(rows[8 * matrix + low.row], low.column) |
                     static_cast<std::uint32_t>(element(rows[8 * matrix + high.row], high.column)) << 16;
    }
    x.store(i.operands[0].elements[matrix], result);
  }
  return Step::kNext;
}

Step store_matrix(Execution& x, const Instruction& i) {
  if (!whole_warp(x, i)) return Step::kStay;
  const int count = i.option[0];
  const bool transposed = i.option[1];
  std::uint16_t tile[4][8][8];
  for (int matrix = 0; matrix < count; ++matrix) {
    const std::uint32_t* source = x.row<std::uint32_t>(i.operands[1].elements[matrix]);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const Place place = ldmatrix_element(lane, half, transposed);
        tile[matrix][place.row][place.column] = static_cast<std::uint16_t>(source[lane] >> (16 * half));
      }
    }
  }
  for (int lane = 0; lane < 8 * count; ++lane) {
    const std::uint16_t* row = tile[lane / 8][lane % 8];
    std::uint8_t* target =
        x.access(x.site(i, lane), Space::kShared, x.shared_offset(i, i.operands[0], lane), 16, Kind::kWrite, row);
    if (target != nullptr) std::memcpy(target, row, 16);
  }
  return Step::kNext;
}

// movmatrix.sync.aligned.m8n8.trans.b16
Step transpose_matrix(Execution& x, const Instruction& i) {
  if (!whole_warp(x, i)) return Step::kStay;
  std::uint16_t tile[8][8];
  const std::uint32_t* source = x.row<std::uint32_t>(i.operands[1]);
  alignas(64) std::uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int half = 0; half < 2; ++half) {
      const Place place = ldmatrix_element(lane, half, false);
      tile[place.row][place.column] = static_cast<std::uint16_t>(source[lane] >> (16 * half));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const Place low = ldmatrix_element(lane, 0, true), high = ldmatrix_element(lane, 1, true);
    result[lane] = tile[low.row][low.column] | static_cast<std::uint32_t>(tile[high.row][high.column]) << 16;
  }
  x.store(i.operands[0], result);
  return Step::kNext;
}

float half_of(std::uint32_t pair, int half, bool bfloat) {
  const auto bits = static_cast<std::uint16_t>(pair >> (16 * half));
  return bfloat ? static_cast<float>(bits_as<BFloat>(bits)) : static_cast<float>(bits_as<Half>(bits));
}

// mma d, a, b, c; option: k, bits per element (16 or 32), bfloat, accumulator in half precision
template <int kDepth>
Step multiply_accumulate(Execution& x, const Instruction& i) {
  if (!whole_warp(x, i)) return Step::kStay;
  ++x.counters.mma;
  const bool wide = i.option[1] == 32, bfloat = i.option[2], half_sums = i.option[3];
  float a[16][kDepth], b[kDepth][8];
  double sum[16][8];
  const std::vector<Operand>& a_registers = i.operands[1].elements;
  const std::vector<Operand>& b_registers = i.operands[2].elements;
  for (int index = 0; index < static_cast<int>(a_registers.size()); ++index) {
    const std::uint32_t* row = x.row<std::uint32_t>(a_registers[index]);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (wide) {
        const Place place = mma_a32(lane, index);
        a[place.row][place.column] = truncate_tf32(bits_as<float>(row[lane]));
        continue;
      }
      const Place place = mma_a(lane, index, 0);
      a[place.row][place.column] = half_of(row[lane], 0, bfloat);
      a[place.row][place.column + 1] = half_of(row[lane], 1, bfloat);
    }
  }
  for (int index = 0; index < static_cast<int>(b_registers.size()); ++index) {
    const std::uint32_t* row = x.row<std::uint32_t>(b_registers[index]);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (wide) {
        const Place place = mma_b32(lane, index);
        b[place.row][place.column] = truncate_tf32(bits_as<float>(row[lane]));
        continue;
      }
      const Place place = mma_b(lane, index, 0);
      b[place.row][place.column] = half_of(row[lane], 0, bfloat);
      b[place.row + 1][place.column] = half_of(row[lane], 1, bfloat);
    }
  }
  for (int m = 0; m < 16; ++m) {
    double row[8] = {};
    for (int k = 0; k < kDepth; ++k) {
      const double factor = a[m][k];
      for (int n = 0; n < 8; ++n) row[n] += factor * static_cast<double>(b[k][n]);
    }
    std::memcpy(sum[m], row, sizeof row);
  }
  // All results before the first is stored: D may share registers with C in any order.
  const std::vector<Operand>& d = i.operands[0].elements;
  const std::vector<Operand>& c = i.operands[3].elements;
  alignas(64) std::uint32_t results[4][kLanes];
  for (std::size_t index = 0; index < d.size(); ++index) {
    const std::uint32_t* start = x.row<std::uint32_t>(c[index]);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (half_sums) {  // two columns in one register
        const Place place = mma_c(lane, 2 * static_cast<int>(index));
        const Half low(half_of(start[lane], 0, false) + sum[place.row][place.column]);
        const Half high(half_of(start[lane], 1, false) + sum[place.row][place.column + 1]);
        results[index][lane] = bits_as<std::uint32_t>(Pair<Half>{low, high});
      } else {
        const Place place = mma_c(lane, static_cast<int>(index));
        const double start_value = bits_as<float>(start[lane]);
        results[index][lane] = bits_as<std::uint32_t>(static_cast<float>(start_value + sum[place.row][place.column]));
      }
    }
  }
  for (std::size_t index = 0; index < d.size(); ++index) x.store(d[index], results[index]);
  return Step::kNext;
}

void check_sizes(Decoder& d, std::size_t index, std::size_t registers) {
  if (d.operand(index).kind != Operand::Kind::kVector || d.operand(index).elements.size() != registers) {
    d.fail("operand " + std::to_string(index) + " must be " + std::to_string(registers) + " registers in braces");
  }
}

void decode_mma(Decoder& d) {
  d.take("sync");
  d.take("aligned");
  const int shape = d.take_one_of({"m16n8k16", "m16n8k8", "m16n8k4"});
  if (shape < 0) d.fail("this shape is not supported");
  if (!d.take("row") || !d.take("col")) d.fail("A must be .row and B must be .col");
  const Type sum = d.take_type(), a = d.take_type(), b = d.take_type(), start = d.take_type();
  const bool wide = a == Type::kTF32;
  const int depth = shape == 0 ? 16 : shape == 1 ? 8 : 4;
  const bool sums_ok = sum == start && (sum == Type::kF32 || (sum == Type::kF16 && a == Type::kF16));
  const bool inputs_ok = a == b && (a == Type::kF16 || a == Type::kBF16 || wide);
  if (!sums_ok || !inputs_ok || depth == (wide ? 16 : 4)) d.fail("these types are not supported");
  const std::size_t elements_per_register = wide ? 1 : 2;
  check_sizes(d, 0, sum == Type::kF16 ? 2 : 4);
  check_sizes(d, 1, 16 * depth / kLanes / elements_per_register);
  check_sizes(d, 2, 8 * depth / kLanes / elements_per_register == 0 ? 1 : 8 * depth / kLanes / elements_per_register);
  check_sizes(d, 3, sum == Type::kF16 ? 2 : 4);
  for (const std::size_t index : {0, 1, 2, 3}) d.source(index, 4);
  d.instruction.option = {depth, wide ? 32 : 16, a == Type::kBF16, sum == Type::kF16};
  d.instruction.handler = depth == 16  ? &multiply_accumulate<16>
                          : depth == 8 ? &multiply_accumulate<8>
                                       : &multiply_accumulate<4>;
}

void decode_matrix_move(Decoder& d) {
  d.take("sync");
  d.take("aligned");
  if (!d.take("m8n8")) d.fail("only .m8n8 is supported");
  const int count = d.take_one_of({"x1", "x2", "x4"});
  const bool transposed = d.take("trans");
  if (d.take_type() != Type::kB16) d.fail("only .b16 is supported");
  if (d.is("movmatrix")) {
    if (!transposed) d.fail("only .trans is supported");
    d.source(0, 4);
    d.source(1, 4);
    d.instruction.handler = &transpose_matrix;
    return;
  }
  if (count < 0) d.fail("one of .x1, .x2, .x4 is needed");
  d.instruction.space = d.take_space();
  d.instruction.option = {1 << count, transposed};
  const bool store = d.is("stmatrix");
  Operand& registers = d.operand(store ? 1 : 0);
  if (registers.kind == Operand::Kind::kRegister) {
    Operand vector;
    vector.kind = Operand::Kind::kVector;
    vector.elements = {registers};
    registers = vector;
  }
  check_sizes(d, store ? 1 : 0, 1 << count);
  d.source(store ? 1 : 0, 4);
  d.address(store ? 0 : 1);
  d.instruction.handler = store ? &store_matrix : &load_matrix;
}

}  // namespace

bool decode_matrix(Decoder& d) {
  if (d.is("mma")) return decode_mma(d), true;
  if (d.is("ldmatrix") || d.is("stmatrix") || d.is("movmatrix")) return decode_matrix_move(d), true;
  return false;
}

}  // namespace emulator
