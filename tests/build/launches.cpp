// SPDX-License-Identifier: Apache-2.0
// Reads calls of kernel entries and prints what they would launch. launches.py writes the calls.
//
// A call is the name of its entry; a line for each member of its parameters, the member's name and
// words that read() takes; and an empty line. A launch is printed as
//
//   blocks threads shared_bytes kernel
//
// and an empty line ends the launches of a call.
#include "launches.h"

#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "category_statistics/category_statistics.h"
#include "gated_fusion/gated_fusion.h"
#include "neighborhood_attention/neighborhood_attention.h"
#include "pyramid_pool/pyramid_pool.h"

namespace launches {

const char* note(const std::type_info& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  char* const name = abi::__cxa_demangle(kernel.name(), nullptr, nullptr, nullptr);
  std::printf("%lld %u %zu %s\n", 1ll * grid.x * grid.y * grid.z, block.x * block.y * block.z,
              shared_bytes, name);
  std::free(name);
  return nullptr;
}

namespace {

using namespace ctxops;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

// The next of the words as one of `names`, which it stands for by its place among them.
template <size_t kCount>
int read_name(std::istream& words, const char* const (&names)[kCount]) {
  std::string word;
  words >> word;
  for (size_t i = 0; i < kCount; ++i) {
    if (word == names[i]) return static_cast<int>(i);
  }
  fail("nothing is named '" + word + "'");
}

void read(std::istream& words, int64_t& to) { words >> to; }
void read(std::istream& words, bool& to) { words >> to; }
void read(std::istream& words, double& to) { words >> to; }
void read(std::istream& words, Border& to) {
  to = static_cast<Border>(read_name(words, kBorderNames));
}

// dtype, byte that the memory starts at, number of dimensions, sizes, strides
void read(std::istream& words, TensorView& to) {
  constexpr const char* kDTypes[] = {"other", "float32", "float64", "float16", "bfloat16",
                                     "uint8", "int8",    "int16",   "int32",   "int64"};
  to.dtype = static_cast<DType>(read_name(words, kDTypes));
  uintptr_t start = 0;
  words >> start >> to.ndim;
  to.data = reinterpret_cast<void*>((uintptr_t{1} << 30) + start);
  for (int i = 0; i < to.ndim; ++i) words >> to.size[i];
  for (int i = 0; i < to.ndim; ++i) {
    words >> to.stride[i];
    if (to.size[i] <= 1) to.stride[i] = 0;
  }
}

// A count and so many of them.
template <typename List>
auto read(std::istream& words, List& to) -> decltype(to.count, void()) {
  words >> to.count;
  for (int i = 0; i < to.count; ++i) read(words, to.value[i]);
}

using Members = std::map<std::string, std::istringstream>;

template <typename Params>
const char* call(const char* (*entry)(const Params&, Stream), Members& members) {
  Params params{};
  std::istringstream names(Params::kMembers);
  const auto read_member = [&](auto& member) {
    std::string name;
    std::getline(names >> std::ws, name, ',');
    read(members[name], member);
    if (!members[name]) fail("the member " + name + " is not as its struct has it");
  };
  params.visit([&](auto&... member) { (read_member(member), ...); });
  return entry(params, {});
}

const char* call(const std::string& entry, Members& members) {
#define CALL(name) \
  if (entry == #name) return call(cuda::name, members)
  CALL(category_statistics);
  CALL(gated_fusion_forward);
  CALL(gated_fusion_backward);
  CALL(neighborhood_attention_forward);
  CALL(neighborhood_attention_backward);
  CALL(pyramid_pool_forward);
  CALL(pyramid_pool_backward);
#undef CALL
  return "is no entry";
}

}  // namespace
}  // namespace launches

int main() {
  for (std::string entry, line; std::getline(std::cin, entry);) {
    launches::Members members;
    while (std::getline(std::cin, line) && !line.empty()) {
      const size_t space = line.find(' ');
      members[line.substr(0, space)].str(line.substr(space + 1));
    }
    if (const char* error = launches::call(entry, members)) launches::fail(entry + ": " + error);
    std::printf("\n");
  }
}
