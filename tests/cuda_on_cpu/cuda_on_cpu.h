// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA runtime on the host. The threads of a block are fibers of one host thread
// that run until they wait; a misuse of a barrier ends the program with exit code 97.
//
// Shared memory is allocated and filled with 0xff for every block, so that the address sanitizer
// sees its bounds and a read before a write is a NaN. A missing barrier shows as a difference
// between the two orders of threads.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorInvalidDevice };

namespace cuda_on_cpu {

enum class Order { ascending, descending };

struct Settings {
  Order order = Order::ascending;  // CTXOPS_THREAD_ORDER=descending in the environment: the other
  int64_t largest_grid = INT32_MAX;
};

inline Settings initial_settings() {
  Settings settings;
  const char* order = std::getenv("CTXOPS_THREAD_ORDER");
  if (order != nullptr && std::strcmp(order, "descending") == 0) settings.order = Order::descending;
  return settings;
}

inline Settings settings = initial_settings();

// What the last launch was given.
struct Launch {
  int device;
  cudaStream_t stream;
};

inline Launch last_launch;
inline int current_device = 0;
inline cudaError_t last_error = cudaSuccess;

constexpr int kDevices = 2;
constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMisuse = 97;

enum class State { ready, at_block_barrier, at_warp_barrier, returned };

// A copy that a thread may not yet rely on.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int64_t group;
};

#if defined(__x86_64__)
// As swapcontext, without its system calls. The address sanitizer's swapcontext also forgets all
// that it knows of a stack, which takes longer than most kernels.
struct Context {
  void* top;  // of the stack, where the registers lie that a call preserves
};

__attribute__((naked, noipa)) inline void switch_context(Context& /* from */, Context& /* to */) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi); mov (%rsi), %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

inline void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 8;
  std::memset(top, 0, 8 * sizeof *top);  // six registers, the entry, where the entry returns to
  top[6] = reinterpret_cast<void*>(entry);
  context.top = top;
}
#else
using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Fiber {
  Context context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  void* fake_stack = nullptr;  // the address sanitizer's
  State state = State::returned;
  uint32_t mask = 0;          // lanes that the warp barrier waits for
  const char* place = "";     // where it waits
  unsigned char exchange[8];  // what a shuffle offers to other lanes
  std::vector<Copy> copies;
  int64_t group = 0;
};

struct Machine {
  Context scheduler;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  std::vector<std::unique_ptr<Fiber>> owned;
  Fiber* fibers[1024];  // an index into a vector is slow without optimisation
  int threads = 0, running = 0;
  std::function<void()> body;
  std::vector<std::pair<const void*, unsigned char*>> shared;  // by the place of its declaration
  unsigned char* dynamic_shared = nullptr;
};

inline Machine machine;

[[noreturn]] inline void misuse(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s, in block (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y,
               blockIdx.z);
  const char* place = nullptr;
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    if (fiber.state == State::ready || fiber.state == State::returned) continue;
    if (place == fiber.place) continue;
    place = fiber.place;
    std::fprintf(stderr, "  thread %d waits at %s, mask %08x\n", i, fiber.place, fiber.mask);
  }
  std::fflush(stderr);
  std::_Exit(kMisuse);
}

// From here to run_block: the scheduler, half of the time where nothing is optimised.
#pragma GCC push_options
#pragma GCC optimize("O1")

inline void resume(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack.get(), kStackBytes);
#endif
  switch_context(machine.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
}

inline void pause(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.fake_stack, machine.stack_bottom, machine.stack_size);
#endif
  switch_context(fiber.context, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.stack_bottom, &machine.stack_size);
#endif
}

// A fiber lives as long as the program and runs one thread of one block after the other.
inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  for (;;) {
    machine.body();
    Fiber& fiber = *machine.fibers[machine.running];
    if (!fiber.copies.empty()) misuse("a thread returned before its copies arrived");
    fiber.state = State::returned;
    pause(fiber);
  }
}

inline void add_fiber() {
  machine.owned.push_back(std::make_unique<Fiber>());
  Fiber& fiber = *machine.owned.back();
  machine.fibers[machine.owned.size() - 1] = &fiber;
  prepare(fiber.context, fiber.stack.get(), fiber_main);
}

inline void wait(State state, uint32_t mask, const char* place) {
  Fiber& fiber = *machine.fibers[machine.running];
  fiber.state = state;
  fiber.mask = mask;
  fiber.place = place;
  pause(fiber);
}

inline void block_barrier(const char* place) { wait(State::at_block_barrier, 0, place); }

inline void warp_barrier(const char* place, uint32_t mask = 0xffffffffu) {
  if ((mask >> machine.running % kWarp & 1u) == 0) {
    misuse("a lane waits for a mask that does not name it");
  }
  wait(State::at_warp_barrier, mask, place);
}

// Every lane of the mask offers a value and takes that of lane `source`; 0xff... from a lane that
// the mask does not name.
template <typename T>
T shuffle(const char* place, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(Fiber::exchange), "a shuffle moves at most 8 bytes");
  const int first = machine.running / kWarp * kWarp;
  std::memcpy(machine.fibers[machine.running]->exchange, &value, sizeof value);
  warp_barrier(place, mask);
  std::memset(&value, 0xff, sizeof value);
  if (mask >> source & 1u) {
    std::memcpy(&value, machine.fibers[first + source]->exchange, sizeof value);
  }
  warp_barrier(place, mask);
  return value;
}

template <typename T>
T shuffle_from(const char* place, uint32_t mask, T value, int lane) {
  return shuffle(place, mask, value, lane % kWarp);
}
template <typename T>
T shuffle_xor(const char* place, uint32_t mask, T value, int lane_mask) {
  return shuffle(place, mask, value, (machine.running % kWarp) ^ lane_mask);
}
template <typename T>
T shuffle_down(const char* place, uint32_t mask, T value, int delta) {
  const int lane = machine.running % kWarp;
  return shuffle(place, mask, value, lane + delta < kWarp ? lane + delta : lane);
}
template <typename T>
T shuffle_up(const char* place, uint32_t mask, T value, int delta) {
  const int lane = machine.running % kWarp;
  return shuffle(place, mask, value, lane >= delta ? lane - delta : lane);
}

inline void* shared_memory(const void* declaration, size_t bytes) {
  for (const auto& [key, memory] : machine.shared) {
    if (key == declaration) return memory;
  }
  auto* memory = static_cast<unsigned char*>(std::malloc(bytes));
  std::memset(memory, 0xff, bytes);
  machine.shared.emplace_back(declaration, memory);
  return memory;
}

// All groups but the last `left` arrive: no sooner, so that a copy which nobody waits for shows.
inline void wait_for_copies(int64_t left) {
  Fiber& fiber = *machine.fibers[machine.running];
  std::vector<Copy> later;
  for (const Copy& copy : fiber.copies) {
    if (copy.group < fiber.group - left) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      later.push_back(copy);
    }
  }
  fiber.copies = std::move(later);
}

// Lets the warps go on whose barriers are complete. Did any?
inline bool release_warps() {
  bool released = false;
  for (int first = 0; first < machine.threads; first += kWarp) {
    const int lanes = machine.threads - first < kWarp ? machine.threads - first : kWarp;
    for (int i = 0; i < lanes; ++i) {
      const Fiber& one = *machine.fibers[first + i];
      if (one.state != State::at_warp_barrier) continue;
      const uint32_t mask = one.mask;
      uint32_t arrived = 0;
      for (int j = 0; j < lanes; ++j) {
        const Fiber& other = *machine.fibers[first + j];
        const bool same = other.state == State::at_warp_barrier && other.mask == mask;
        arrived |= static_cast<uint32_t>(same) << j;
      }
      if (arrived != mask) continue;
      for (int j = 0; j < lanes; ++j) {
        if (mask >> j & 1u) machine.fibers[first + j]->state = State::ready;
      }
      released = true;
    }
  }
  return released;
}

inline void release_block() {
  int waiting = 0, returned = 0;
  const char* place = nullptr;
  bool one_place = true;
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    returned += fiber.state == State::returned;
    if (fiber.state != State::at_block_barrier) continue;
    ++waiting;
    one_place = one_place && (place == nullptr || std::strcmp(place, fiber.place) == 0);
    place = fiber.place;
  }
  if (waiting < machine.threads) {
    misuse(waiting > 0 && waiting + returned == machine.threads
               ? "threads returned before a barrier of their block"
               : "deadlock: a mask names lanes that do not arrive, or barriers differ");
  }
  if (!one_place) misuse("threads of a block wait at different barriers");
  for (int i = 0; i < machine.threads; ++i) machine.fibers[i]->state = State::ready;
}

inline void run_block() {
  const int threads = machine.threads;
  for (int i = 0; i < threads; ++i) machine.fibers[i]->state = State::ready;
  for (;;) {
    bool ran = false, all_returned = true;
    for (int i = 0; i < threads; ++i) {
      const int thread = settings.order == Order::ascending ? i : threads - 1 - i;
      Fiber& fiber = *machine.fibers[thread];
      if (fiber.state == State::ready) {
        const unsigned n = static_cast<unsigned>(thread);
        threadIdx = dim3(n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y);
        machine.running = thread;
        resume(fiber);
        ran = true;
      }
      all_returned = all_returned && fiber.state == State::returned;
    }
    if (all_returned) return;
    if (!ran && !release_warps()) release_block();
  }
}

#pragma GCC pop_options

template <typename F>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, const F& body) {
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > 1024 || blocks < 1 || grid.x > INT32_MAX || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > 48 * 1024) {
    return cudaErrorInvalidConfiguration;
  }
  last_launch = {current_device, stream};
  machine.threads = static_cast<int>(threads);
  while (machine.owned.size() < static_cast<size_t>(threads)) add_fiber();
  machine.body = body;
  gridDim = grid;
  blockDim = block;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t n = settings.order == Order::ascending ? i : blocks - 1 - i;
    blockIdx = dim3(static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                    static_cast<unsigned>(n / grid.x / grid.y));
    machine.dynamic_shared = static_cast<unsigned char*>(std::malloc(shared_bytes));
    std::memset(machine.dynamic_shared, 0xff, shared_bytes);
    run_block();
    std::free(machine.dynamic_shared);
    for (const auto& declared : machine.shared) std::free(declared.second);
    machine.shared.clear();
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_on_cpu::last_error, cudaSuccess);
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: return "no error";
  }
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::current_device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_on_cpu::kDevices) return cudaErrorInvalidDevice;
  cuda_on_cpu::current_device = device;
  return cudaSuccess;
}

inline int __ffs(int x) { return __builtin_ffs(x); }

inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long x) {
  return std::exchange(*to, *to + x);
}

template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

namespace ctxops {
namespace {

template <int kBytes>
void copy_async(void* to, const void* from) {
  static_assert(kBytes == 8 || kBytes == 16, "these sizes are copied at once");
  auto& fiber = *cuda_on_cpu::machine.fibers[cuda_on_cpu::machine.running];
  fiber.copies.push_back({to, from, kBytes, fiber.group});
}
inline void copy_commit() { ++cuda_on_cpu::machine.fibers[cuda_on_cpu::machine.running]->group; }
template <int kLeft>
void copy_wait() {
  cuda_on_cpu::wait_for_copies(kLeft);
}

}  // namespace
}  // namespace ctxops

#define CUDA_ON_CPU_TEXT_OF(x) #x
#define CUDA_ON_CPU_TEXT(x) CUDA_ON_CPU_TEXT_OF(x)
#define CUDA_ON_CPU_PLACE __FILE__ ":" CUDA_ON_CPU_TEXT(__LINE__)

#define __syncthreads() ::cuda_on_cpu::block_barrier(CUDA_ON_CPU_PLACE)
#define __syncwarp(...) ::cuda_on_cpu::warp_barrier(CUDA_ON_CPU_PLACE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) ::cuda_on_cpu::shuffle_from(CUDA_ON_CPU_PLACE, __VA_ARGS__)
#define __shfl_xor_sync(...) ::cuda_on_cpu::shuffle_xor(CUDA_ON_CPU_PLACE, __VA_ARGS__)
#define __shfl_down_sync(...) ::cuda_on_cpu::shuffle_down(CUDA_ON_CPU_PLACE, __VA_ARGS__)
#define __shfl_up_sync(...) ::cuda_on_cpu::shuffle_up(CUDA_ON_CPU_PLACE, __VA_ARGS__)

#define CTXOPS_LARGEST_GRID ::cuda_on_cpu::settings.largest_grid

#define CTXOPS_SHARED(T, name, count)    \
  static const char name##_declared = 0; \
  T* const name = static_cast<T*>(       \
      ::cuda_on_cpu::shared_memory(&name##_declared, sizeof(T) * static_cast<size_t>(count)))

#define CTXOPS_DYNAMIC_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(::cuda_on_cpu::machine.dynamic_shared)

#define CTXOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                            \
  ([&]() -> const char* {                                                                        \
    ::cuda_on_cpu::last_error = ::cuda_on_cpu::launch((grid), (block), (shared_bytes), (stream), \
                                                      [&] { kernel(__VA_ARGS__); });             \
    return ::ctxops::error_text(cudaGetLastError());                                             \
  }())
