// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA runtime on the host. The threads of a block are fibers of one host thread
// that run until they wait; a misuse of a barrier ends the program with exit code 97.
//
// Shared memory is allocated and filled with 0xff for every block, so that the address sanitizer
// sees its bounds and a read before a write is a NaN. A warp runs until all of its lanes wait for
// the block: so a missing barrier shows as a difference between the two orders of threads.
//
// Under the thread sanitizer every thread of a block is a thread to it, and only barriers order
// what they do to memory: a missing one is a data race, whatever the order. Shuffles order nothing.
// With CTXOPS_BLOCKS=unordered in the environment nothing orders the blocks of a launch.
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
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(void* from, unsigned long bytes);
void __tsan_write_range(void* to, unsigned long bytes);
}
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

// CTXOPS_BLOCKS=unordered in the environment: not to the thread sanitizer.
inline bool are_blocks_ordered() {
  const char* blocks = std::getenv("CTXOPS_BLOCKS");
  return blocks == nullptr || std::strcmp(blocks, "unordered") != 0;
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

// What we ask of the thread sanitizer; without it, nothing.
namespace races {
using Thread = void*;
#if defined(__SANITIZE_THREAD__)
inline Thread current() { return __tsan_get_current_fiber(); }
inline Thread create() { return __tsan_create_fiber(0); }
inline void destroy(Thread thread) { __tsan_destroy_fiber(thread); }
inline void become(Thread thread) { __tsan_switch_to_fiber(thread, 1 /* orders nothing */); }
// All that came before a release of the tag comes before what follows an acquire of it.
inline void release(char* tag) { __tsan_release(tag); }
inline void acquire(char* tag) { __tsan_acquire(tag); }
inline void reads(const void* from, size_t bytes) {
  __tsan_read_range(const_cast<void*>(from), bytes);
}
inline void writes(void* to, size_t bytes) { __tsan_write_range(to, bytes); }
// While it lives the thread's accesses are not looked at: they are the machine's own.
struct Unwatched {
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
inline Thread current() { return nullptr; }
inline Thread create() { return nullptr; }
inline void destroy(Thread) {}
inline void become(Thread) {}
inline void release(char*) {}
inline void acquire(char*) {}
inline void reads(const void*, size_t) {}
inline void writes(void*, size_t) {}
struct Unwatched {
  ~Unwatched() {}
};
#endif
}  // namespace races

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

__attribute__((naked, noipa, no_sanitize_thread)) inline void switch_context(Context& /* from */,
                                                                             Context& /* to */) {
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
  races::Thread thread = races::create();
  int block_barriers = 0, warp_barriers = 0;  // that it has come to
  State state = State::returned;
  uint32_t mask = 0;          // lanes that the warp barrier waits for
  const char* place = "";     // where it waits
  unsigned char exchange[8];  // what a shuffle offers to other lanes
  std::vector<Copy> copies;
  int64_t group = 0;

  ~Fiber() { races::destroy(thread); }
};

// Of the barriers of a block, each in two: who comes to the next one early must not be ordered
// before who leaves this one late.
struct Tags {
  char block[2], warps[1024 / kWarp][2];
};

struct Machine {
  Context scheduler;
  races::Thread thread = races::current();
  char launch_tag, end_tag;
  std::unique_ptr<Tags> tags{new Tags};
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
  races::become(fiber.thread);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack.get(), kStackBytes);
#endif
  switch_context(machine.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
}

inline void pause(Fiber& fiber) {
  races::become(machine.thread);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.fake_stack, machine.stack_bottom, machine.stack_size);
#endif
  switch_context(fiber.context, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.stack_bottom, &machine.stack_size);
#endif
}

// A fiber lives as long as the program, unless blocks are unordered, and runs one thread of one
// block after the other.
inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  for (;;) {
    races::acquire(&machine.launch_tag);
    // Other blocks had other numbers of threads.
    machine.fibers[machine.running]->block_barriers = 0;
    machine.fibers[machine.running]->warp_barriers = 0;
    machine.body();
    Fiber& fiber = *machine.fibers[machine.running];
    if (!fiber.copies.empty()) misuse("a thread returned before its copies arrived");
    fiber.state = State::returned;
    races::release(&machine.end_tag);
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

inline void block_barrier(const char* place) {
  char* const tag = &machine.tags->block[machine.fibers[machine.running]->block_barriers++ % 2];
  races::release(tag);
  wait(State::at_block_barrier, 0, place);
  races::acquire(tag);
}

// As shuffles need it: it orders no memory.
inline void warp_barrier(const char* place, uint32_t mask = 0xffffffffu) {
  if ((mask >> machine.running % kWarp & 1u) == 0) {
    misuse("a lane waits for a mask that does not name it");
  }
  wait(State::at_warp_barrier, mask, place);
}

// Orders memory where the mask names the whole warp; no kernel has another one.
inline void sync_warp(const char* place, uint32_t mask = 0xffffffffu) {
  const bool whole = mask == 0xffffffffu;
  Fiber& fiber = *machine.fibers[machine.running];
  char* const tag = &machine.tags->warps[machine.running / kWarp][fiber.warp_barriers % 2];
  fiber.warp_barriers += whole;
  if (whole) races::release(tag);
  warp_barrier(place, mask);
  if (whole) races::acquire(tag);
}

// Every lane of the mask offers a value and takes that of lane `source`; 0xff... from a lane that
// the mask does not name.
template <typename T>
T shuffle(const char* place, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(Fiber::exchange), "a shuffle moves at most 8 bytes");
  const races::Unwatched machine_alone;
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
  const races::Unwatched machine_alone;
  for (const auto& [key, memory] : machine.shared) {
    if (key == declaration) return memory;
  }
  auto* memory = static_cast<unsigned char*>(std::malloc(bytes));
  std::memset(memory, 0xff, bytes);
  machine.shared.emplace_back(declaration, memory);
  return memory;
}

// A copy may write from now on, until it is waited for.
inline void start_copy(void* to, const void* from, size_t bytes) {
  Fiber& fiber = *machine.fibers[machine.running];
  races::reads(from, bytes);
  races::writes(to, bytes);
  fiber.copies.push_back({to, from, bytes, fiber.group});
}

// All groups but the last `left` arrive: no sooner, so that a copy which nobody waits for shows.
inline void wait_for_copies(int64_t left) {
  Fiber& fiber = *machine.fibers[machine.running];
  std::vector<Copy> later;
  for (const Copy& copy : fiber.copies) {
    if (copy.group < fiber.group - left) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      races::writes(copy.to, copy.bytes);
    } else {
      later.push_back(copy);
    }
  }
  fiber.copies = std::move(later);
}

// Lets the lanes of a warp go on whose barriers are complete.
inline void release_warp(int first, int lanes) {
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
  }
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

// Runs a thread if it is ready. Was it?
inline bool run_thread(int thread) {
  Fiber& fiber = *machine.fibers[thread];
  if (fiber.state != State::ready) return false;
  const unsigned n = static_cast<unsigned>(thread);
  threadIdx = dim3(n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y);
  machine.running = thread;
  resume(fiber);
  return true;
}

inline void run_block() {
  const bool ascending = settings.order == Order::ascending;
  const int threads = machine.threads, warps = (threads + kWarp - 1) / kWarp;
  for (int i = 0; i < threads; ++i) machine.fibers[i]->state = State::ready;
  for (;; release_block()) {
    for (int w = 0; w < warps; ++w) {
      const int first = (ascending ? w : warps - 1 - w) * kWarp;
      const int lanes = threads - first < kWarp ? threads - first : kWarp;
      for (bool ran = true; ran; release_warp(first, lanes)) {
        ran = false;
        for (int i = 0; i < lanes; ++i) ran |= run_thread(first + (ascending ? i : lanes - 1 - i));
      }
    }
    bool all_returned = true;
    for (int i = 0; i < threads; ++i) {
      all_returned = all_returned && machine.fibers[i]->state == State::returned;
    }
    if (all_returned) return;
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
  machine.body = body;
  gridDim = grid;
  blockDim = block;
  races::release(&machine.launch_tag);
  for (int64_t i = 0; i < blocks; ++i) {
    const races::Unwatched machine_alone;
    const int64_t n = settings.order == Order::ascending ? i : blocks - 1 - i;
    blockIdx = dim3(static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                    static_cast<unsigned>(n / grid.x / grid.y));
    machine.dynamic_shared = static_cast<unsigned char*>(std::malloc(shared_bytes));
    std::memset(machine.dynamic_shared, 0xff, shared_bytes);
    if (!are_blocks_ordered()) {  // other threads, other tags: ten times as slow
      machine.owned.clear();
      machine.tags.reset(new Tags);
    }
    while (machine.owned.size() < static_cast<size_t>(threads)) add_fiber();
    run_block();
    std::free(machine.dynamic_shared);
    for (const auto& declared : machine.shared) std::free(declared.second);
    machine.shared.clear();
  }
  races::acquire(&machine.end_tag);
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

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

// An H200 has so many.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 132;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_on_cpu::kDevices) return cudaErrorInvalidDevice;
  cuda_on_cpu::current_device = device;
  return cudaSuccess;
}

inline int __ffs(int x) { return __builtin_ffs(x); }

inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long x) {
  return __atomic_fetch_add(to, x, __ATOMIC_RELAXED);
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
  cuda_on_cpu::start_copy(to, from, kBytes);
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
#define __syncwarp(...) ::cuda_on_cpu::sync_warp(CUDA_ON_CPU_PLACE __VA_OPT__(, ) __VA_ARGS__)
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

#if !defined(CTXOPS_LAUNCH)  // who only notes launches has one of its own
#define CTXOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                            \
  ([&]() -> const char* {                                                                        \
    ::cuda_on_cpu::last_error = ::cuda_on_cpu::launch((grid), (block), (shared_bytes), (stream), \
                                                      [&] { kernel(__VA_ARGS__); });             \
    return ::ctxops::error_text(cudaGetLastError());                                             \
  }())
#endif
