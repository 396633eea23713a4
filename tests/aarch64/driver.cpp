// Runs one CPU kernel on arguments from files: tests/test_aarch64.py calls the kernels of another processor with it.
//
//   driver <call> <memory>
//
// The text file <call> names an entry point in its first line; every other line is an argument under its name in
// csrc/bindings: a number, or a tensor as its offset in <memory> in bytes, shape and strides, or nothing for nullptr.
// <memory> holds all tensors, little-endian, and is written back after the call.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "andromeda/attention.h"
#include "andromeda/qk_norm_rotary.h"

namespace {

using namespace andromeda;

struct alignas(64) CacheLine {  // the alignment of torch's memory
  char bytes[64];
};

class Call {
 public:
  Call(const char* call_path, const char* memory_path) {
    std::ifstream call(call_path);
    std::getline(call, name);
    for (std::string line; std::getline(call, line);) {
      std::istringstream words(line);
      std::string argument;
      words >> argument;
      arguments_[argument] = {std::istream_iterator<double>(words), {}};
      unused_.insert(argument);
    }
    std::ifstream memory(memory_path, std::ios::binary);
    for (CacheLine line; memory.read(line.bytes, sizeof line.bytes);) memory_.push_back(line);
    if (!call.eof() || !memory.eof() || memory.gcount() != 0) throw std::runtime_error("cannot read the whole call");
  }

  bool given(const std::string& argument) { return !values(argument).empty(); }
  double number(const std::string& argument) { return values(argument).at(0); }
  int integer(const std::string& argument) { return static_cast<int>(number(argument)); }
  int size(const std::string& tensor, int axis) { return static_cast<int>(values(tensor).at(1 + axis)); }

  SeqStrides strides(const std::string& tensor) {  // of four dimensions
    const std::vector<double>& v = values(tensor);
    return {static_cast<std::int64_t>(v.at(5)), static_cast<std::int64_t>(v.at(6)), static_cast<std::int64_t>(v.at(7))};
  }

  template <typename T = void>
  T* data(const std::string& tensor) {
    if (!given(tensor)) return nullptr;
    return reinterpret_cast<T*>(memory_.data()->bytes + static_cast<std::size_t>(number(tensor)));
  }

  void write_back(const char* memory_path) const {
    if (!unused_.empty()) throw std::runtime_error(name + " has no argument " + *unused_.begin());
    std::ofstream memory(memory_path, std::ios::binary);
    for (const CacheLine& line : memory_) memory.write(line.bytes, sizeof line.bytes);
    if (!memory.flush()) throw std::runtime_error("cannot write the memory back");
  }

  std::string name;

 private:
  const std::vector<double>& values(const std::string& argument) {
    const auto found = arguments_.find(argument);
    if (found == arguments_.end()) throw std::runtime_error(name + " needs the argument " + argument);
    unused_.erase(argument);
    return found->second;
  }

  std::map<std::string, std::vector<double>> arguments_;
  std::set<std::string> unused_;  // a kernel that gains an argument must not be called without it
  std::vector<CacheLine> memory_;
};

AttentionParams attention_params(Call& call) {
  AttentionParams params{};
  params.q = call.data("q");
  params.k = call.data("k");
  params.v = call.data("v");
  params.alibi_slopes = call.data<float>("alibi_slopes");
  params.logit_bound = call.data<float>("logit_bound");
  params.key_start = call.data<std::int32_t>("key_start");
  params.out = call.data("out");
  params.softmax_lse = call.data<float>("softmax_lse");
  params.q_stride = call.strides("q");
  params.k_stride = call.strides("k");
  params.v_stride = call.strides("v");
  params.out_stride = call.strides("out");
  params.batch = call.size("q", 0);
  params.seqlen_q = call.size("q", 1);
  params.seqlen_k = call.size("k", 1);
  params.num_heads = call.size("q", 2);
  params.num_kv_heads = call.size("k", 2);
  params.head_dim = call.size("q", 3);
  params.softmax_scale = static_cast<float>(call.number("softmax_scale"));
  params.causal = call.integer("causal") != 0;
  params.dtype = static_cast<DType>(call.integer("dtype"));
  return params;
}

void attention_backward(Call& call) {
  AttentionBackwardParams params{};
  params.forward = attention_params(call);
  params.dout = call.data("dout");
  params.dq = call.data("dq");
  params.dk = call.data("dk");
  params.dv = call.data("dv");
  params.dout_stride = call.strides("dout");
  params.dq_stride = call.strides("dq");
  params.dk_stride = call.strides("dk");
  params.dv_stride = call.strides("dv");
  cpu::attention_backward(params, call.integer("num_threads"));
}

// All of an operand but `out`. `x` is q or k.
QkNormRotaryOperand qk_norm_rotary_operand(Call& call, const std::string& x) {
  QkNormRotaryOperand operand{};
  operand.x = call.data(x);
  operand.scale = call.data<float>(x + "_scale");
  operand.table = call.data<float>(x + "_table");
  operand.x_stride = call.strides(x);
  operand.seqlen = call.size(x, 1);
  operand.num_heads = call.size(x, 2);
  operand.multiplier = x == "q" ? static_cast<float>(call.number("q_multiplier")) : 1.0f;
  return operand;
}

template <typename Params>
void qk_norm_rotary_common(Call& call, Params& params) {
  params.batch = call.size("q", 0);
  params.head_dim = call.size("q", 3);
  params.rotary_dim = call.given("q_table") ? call.size("q_table", 1) : 0;
  params.normalize = call.integer("normalize") != 0;
  params.dtype = static_cast<DType>(call.integer("dtype"));
}

void qk_norm_rotary_forward(Call& call) {
  QkNormRotaryParams params{};
  qk_norm_rotary_common(call, params);
  for (const std::string x : {"q", "k"}) {
    QkNormRotaryOperand& operand = x == "q" ? params.q : params.k;
    operand = qk_norm_rotary_operand(call, x);
    operand.out = call.data(x + "_out");
    operand.out_stride = call.strides(x + "_out");
  }
  cpu::qk_norm_rotary_forward(params, call.integer("num_threads"));
}

void qk_norm_rotary_backward(Call& call) {
  QkNormRotaryBackwardParams params{};
  qk_norm_rotary_common(call, params);
  params.num_partials = 1;
  for (const std::string x : {"q", "k"}) {
    QkNormRotaryBackwardOperand& operand = x == "q" ? params.q : params.k;
    operand.forward = qk_norm_rotary_operand(call, x);
    operand.dout = call.data("d" + x + "_out");
    operand.dx = call.data("d" + x);
    operand.dscale_partial = call.data<float>("d" + x + "_scale_partial");
    operand.dout_stride = call.strides("d" + x + "_out");
    operand.dx_stride = call.strides("d" + x);
    if (operand.dscale_partial != nullptr) params.num_partials = call.size("d" + x + "_scale_partial", 0);
  }
  cpu::qk_norm_rotary_backward(params, call.integer("num_threads"));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc != 3) throw std::runtime_error("usage: driver <call> <memory>");
    Call call(argv[1], argv[2]);
    if (call.name == "attention_forward") {
      cpu::attention_forward(attention_params(call), call.integer("num_threads"));
    } else if (call.name == "attention_backward") {
      attention_backward(call);
    } else if (call.name == "qk_norm_rotary_forward") {
      qk_norm_rotary_forward(call);
    } else if (call.name == "qk_norm_rotary_backward") {
      qk_norm_rotary_backward(call);
    } else {
      throw std::runtime_error("no kernel has the name '" + call.name + "'");
    }
    call.write_back(argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "driver: %s\n", error.what());
    return 1;
  }
}
