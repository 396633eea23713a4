// Arithmetic on sizes and indices.
//
// `static`, so that every object file has its own copy: see "Instruction sets" in csrc/README.md.
#pragma once

#include <cstdint>

namespace andromeda {

static constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
static constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }
static constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
static constexpr std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

}  // namespace andromeda
