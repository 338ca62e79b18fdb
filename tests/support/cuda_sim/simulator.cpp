// Runs the blocks of a launch one after another, each thread as a fiber that yields where it waits for others, and watches
// every access to memory: the kernels are compiled with -fsanitize=thread and, for alignment and bounds, -fsanitize=alignment,
// bounds, but the functions that GCC then calls are those below instead of the sanitizers' own. Found so:
//   - a barrier that part of a block does not reach, a warp function that lanes of its mask do not reach
//   - two threads at one place in shared or global memory, one of them writing, with no barrier between them (of one block) or
//     at all (of two), unless both accesses are atomic or both write what stands there already
//   - reads of shared memory that nothing has written in this block, misaligned accesses, indices past an array's end
// Accesses past the end of a tensor are left to AddressSanitizer (tests/ops/test_sanitizers.py).
#include "simulator.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace sim {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kMaxThreads = 1024, kWarp = 32;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  State state;
  const char* what;  // waited for, and where
  Site site;
  unsigned mask, source;
  uint64_t value;
  Received received;
  int count;
  uint32_t warp_epoch;  // of the last __syncwarp
  void* fake_stack;     // AddressSanitizer's
};

// Between two waits of a thread. Accesses are remembered by the segment that made them.
struct Segment {
  uint32_t block, barrier, warp_epoch, fence, thread;
};

// Who touched a byte last: segment numbers from 1, with a mark where the access was atomic.
struct Touched {
  uint32_t write, read, other_read;
};
constexpr uint32_t kAtomic = 1u << 31;
constexpr uintptr_t kPage = 4096;
struct Page {
  Touched bytes[kPage];
};

// A write where another thread's unordered write was: harmless if it changes nothing, which shows when the thread yields.
struct Rewrite {
  uintptr_t address;
  char before;
  uint32_t other;
  void* caller;
};

std::mutex one_launch;
thread_local char in_thread_block;  // has this library's thread-local block allocated
uintptr_t shared_begin, shared_end;

char* stacks;
Fiber fibers[kMaxThreads];
ucontext_t scheduler;
#ifdef __SANITIZE_ADDRESS__
void* scheduler_fake_stack;
const void* scheduler_bottom;
size_t scheduler_size;
#endif
Fiber* current = nullptr;  // null outside of kernels
void (*kernel)(const void*);
const void* kernel_context;
unsigned threads;
uint32_t block_number, barrier_epoch, warp_epochs[kMaxThreads / kWarp];
std::string failure;

std::vector<Segment> segments;
std::vector<uint32_t> fences;  // per block: how often its threads called __threadfence
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page_number;
Page* last_page;
std::vector<Rewrite> rewrites;

unsigned number(const Fiber& f) { return static_cast<unsigned>(&f - fibers); }

std::string text(const Site& site) {
  const char* name = std::strrchr(site.file_name(), '/');
  return std::string(name ? name + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

std::string thread_text(unsigned thread) { return "thread " + std::to_string(thread); }

// The line of a return address, from the debug information, where addr2line is installed.
std::string place(void* address) {
  Dl_info library;
  if (dladdr(address, &library) == 0) return "";
  char command[4096], line[1024] = "";
  std::snprintf(
      command, sizeof(command), "addr2line -s -e '%s' %#tx 2>/dev/null", library.dli_fname,
      static_cast<char*>(address) - 1 - static_cast<char*>(library.dli_fbase));
  if (FILE* pipe = popen(command, "r")) {
    if (std::fgets(line, sizeof(line), pipe) == nullptr) line[0] = 0;
    pclose(pipe);
  }
  std::string found(line, std::strcspn(line, " \n"));
  return found.empty() || found[0] == '?' ? "" : " at " + found;
}

// AddressSanitizer is told of every switch, and where the stack is that is switched to.
void switch_to_scheduler(Fiber& from) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from.state == State::kDone ? nullptr : &from.fake_stack, scheduler_bottom, scheduler_size);
#endif
  swapcontext(&from.context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

// Ends the launch: the fibers are abandoned and run() throws. Does not return inside a kernel.
void fail(const std::string& what) {
  if (failure.empty()) failure = what;
  Fiber& self = *current;
  current = nullptr;
  switch_to_scheduler(self);
}

void yield(State state) {
  Fiber& self = *current;
  self.state = state;
  switch_to_scheduler(self);
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  kernel(kernel_context);
  current->state = State::kDone;
  switch_to_scheduler(*current);
}

// Whether the accesses of `before` happen before what the running thread does now.
bool ordered(const Segment& before) {
  const Segment& now = segments.back();
  if (before.block != now.block) return fences[before.block] > before.fence;  // published, for a last block that sums up
  if (before.thread == now.thread || before.barrier < now.barrier) return true;
  return before.thread / kWarp == now.thread / kWarp && before.warp_epoch < now.warp_epoch;
}

const Segment& segment(uint32_t access) { return segments[(access & ~kAtomic) - 1]; }

Touched& touched(uintptr_t address) {
  const uintptr_t page = address / kPage;
  if (last_page == nullptr || page != last_page_number) {
    auto& found = pages[page];
    if (!found) found = std::make_unique<Page>();
    last_page_number = page;
    last_page = found.get();
  }
  return last_page->bytes[address % kPage];
}

void race(const char* doing, const char* did, uint32_t other, bool shared, void* caller) {
  const Segment& s = segment(other);
  const bool same_block = s.block == block_number;
  fail(
      thread_text(number(*current)) + " " + doing + (shared ? " shared" : " global") + " memory" + place(caller) + " that " +
      thread_text(s.thread) + (same_block ? "" : " of block " + std::to_string(s.block)) + " " + did +
      (same_block ? ", with no barrier between them" : ""));
}

void access(const void* p, int64_t size, bool write, bool atomic, void* caller) {
  if (current == nullptr) return;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto stack = reinterpret_cast<uintptr_t>(stacks);
  if (address >= stack && address < stack + kMaxThreads * kStack) return;
  const bool shared = address >= shared_begin && address < shared_end;
  const uint32_t self = static_cast<uint32_t>(segments.size()) | (atomic ? kAtomic : 0);
  for (uintptr_t at = address; at < address + size; ++at) {
    Touched& byte = touched(at);
    if (shared && byte.write != 0 && segment(byte.write).block != block_number) byte = {};
    if (shared && byte.write == 0 && (!write || atomic)) {
      return fail(thread_text(number(*current)) + " reads shared memory" + place(caller) + " that this block has not written");
    }
    const auto conflicts = [&](uint32_t other) {
      return other != 0 && !(atomic && (other & kAtomic) != 0) && !(shared && segment(other).block != block_number) &&
             !ordered(segment(other));
    };
    if (conflicts(byte.write)) {
      if (!write || atomic) return race("reads", "writes", byte.write, shared, caller);
      rewrites.push_back({at, *reinterpret_cast<const char*>(at), byte.write, caller});
    }
    if (write) {
      if (conflicts(byte.read)) return race("writes", "reads", byte.read, shared, caller);
      if (conflicts(byte.other_read)) return race("writes", "reads", byte.other_read, shared, caller);
      byte.write = self;
    } else if (byte.read == 0 || segment(byte.read).thread == segments.back().thread) {
      byte.read = self;
    } else if (byte.read != self) {
      byte.other_read = byte.read;
      byte.read = self;
    }
  }
}

// Looks at what an unordered write left. Called when its thread has yielded.
void check_rewrites(Fiber& f) {
  for (const Rewrite& r : rewrites) {
    if (*reinterpret_cast<const char*>(r.address) == r.before || !failure.empty()) continue;
    const Segment& s = segment(r.other);
    const bool shared = r.address >= shared_begin && r.address < shared_end;
    failure = thread_text(number(f)) + " writes" + (shared ? " shared" : " global") + " memory" + place(r.caller) + " that " +
              thread_text(s.thread) + " of block " + std::to_string(s.block) + " writes with another value, unordered";
  }
  rewrites.clear();
}

void resume(Fiber& f) {
  const unsigned t = number(f);
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
  segments.push_back({block_number, barrier_epoch, f.warp_epoch, fences[block_number], t});
  f.state = State::kReady;
  current = &f;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stacks + t * kStack, kStack);
#endif
  swapcontext(&scheduler, &f.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
  check_rewrites(f);
}

std::string waiting(const Fiber& f) {
  if (f.state == State::kDone) return thread_text(number(f)) + " has returned";
  std::string mask;
  if (f.state == State::kAtWarp) {
    char hex[24];
    std::snprintf(hex, sizeof(hex), "(%#010x)", f.mask);
    mask = hex;
  }
  return thread_text(number(f)) + " waits in " + f.what + mask + " at " + text(f.site);
}

// Lets go every group of lanes that has arrived completely. Returns whether there was one.
bool release_warps() {
  bool any = false;
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t].state != State::kAtWarp) continue;
    Fiber* lanes = fibers + t / kWarp * kWarp;
    const Fiber& first = fibers[t];
    const auto named = [&](unsigned l) { return (first.mask >> l & 1) != 0; };
    unsigned ballot = 0;
    bool complete = true;
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!named(l)) continue;
      const Fiber& f = lanes[l];
      complete = complete && number(f) < threads && f.state == State::kAtWarp && f.mask == first.mask &&
                 std::strcmp(f.what, first.what) == 0;
      if (complete && f.value != 0) ballot |= 1u << l;
    }
    if (!complete) continue;
    any = true;
    const bool orders_memory = std::strcmp(first.what, "__syncwarp") == 0;
    const uint32_t epoch = orders_memory ? ++warp_epochs[t / kWarp] : 0;
    const unsigned mask = first.mask;
    for (unsigned l = 0; l < kWarp; ++l) {
      if ((mask >> l & 1) == 0) continue;
      Fiber& f = lanes[l];
      if ((mask >> f.source & 1) == 0) {
        failure = waiting(f) + " and reads from lane " + std::to_string(f.source) + ", which is not in the mask";
        return false;
      }
      f.received = {lanes[f.source].value, ballot};
      if (orders_memory) f.warp_epoch = epoch;
      f.state = State::kReady;
    }
  }
  return any;
}

bool release_barrier() {
  int count = 0;
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t].state != State::kAtBarrier) return false;
    count += fibers[t].value != 0;
  }
  for (unsigned t = 1; t < threads; ++t) {
    const Fiber &a = fibers[0], &b = fibers[t];
    if (std::strcmp(a.what, b.what) != 0 || a.site.line() != b.site.line() || std::strcmp(a.site.file_name(), b.site.file_name()) != 0) {
      failure = waiting(a) + ", but " + waiting(b) + ": two barriers";
      return false;
    }
  }
  ++barrier_epoch;
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t].count = count;
    fibers[t].state = State::kReady;
  }
  return true;
}

// Nothing moves: says who waits for whom.
void explain() {
  if (!failure.empty()) return;
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& f = fibers[t];
    if (f.state == State::kAtWarp) {
      for (unsigned l = 0; l < kWarp; ++l) {
        const unsigned other = t / kWarp * kWarp + l;
        if ((f.mask >> l & 1) == 0) continue;
        const Fiber& g = fibers[other];
        if (other < threads && g.state == State::kAtWarp && g.mask == f.mask && std::strcmp(g.what, f.what) == 0) continue;
        failure = waiting(f) + ", but " + (other < threads ? waiting(g) : thread_text(other) + " does not exist");
        return;
      }
    }
  }
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t].state != State::kAtBarrier) continue;
    const auto arrived = std::count_if(fibers, fibers + threads, [](const Fiber& f) { return f.state == State::kAtBarrier; });
    const Fiber* other = std::find_if(fibers, fibers + threads, [](const Fiber& f) { return f.state != State::kAtBarrier; });
    failure = waiting(fibers[t]) + " with " + std::to_string(arrived) + " of " + std::to_string(threads) + " threads, but " +
              waiting(*other);
    return;
  }
}

void find_shared_memory() {
  in_thread_block = 0;
  const auto find = [](dl_phdr_info* library, size_t, void* own) {
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const auto& header = library->dlpi_phdr[i];
      const auto begin = reinterpret_cast<uintptr_t>(library->dlpi_tls_data);
      const auto address = reinterpret_cast<uintptr_t>(own);
      if (header.p_type != PT_TLS || begin == 0 || address < begin || address >= begin + header.p_memsz) continue;
      shared_begin = begin;
      shared_end = begin + header.p_memsz;
      return 1;
    }
    return 0;
  };
  if (dl_iterate_phdr(find, &in_thread_block) == 0) throw std::runtime_error("simulator: no thread-local block");
}

__attribute__((no_sanitize("address"))) void poison_shared_memory() {
  // Not memset, which AddressSanitizer replaces. NaN for a floating-point number, -1 for an integer.
  for (uintptr_t at = shared_begin; at < shared_end; ++at) *reinterpret_cast<volatile unsigned char*>(at) = 0xff;
}

void allocate_stacks() {
  if (stacks != nullptr) return;
  void* memory = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simulator: no memory for the threads' stacks");
  stacks = static_cast<char*>(memory);
  for (unsigned t = 0; t < kMaxThreads; ++t) mprotect(stacks + t * kStack, 4096, PROT_NONE);  // overflow is a fault
}

// The last thread first, the first first, or all at random: results must not depend on it.
std::vector<unsigned> some_order() {
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  if (block_number % 3 == 0) std::reverse(order.begin(), order.end());
  if (block_number % 3 == 2) std::shuffle(order.begin(), order.end(), std::minstd_rand(block_number));
  return order;
}

void run_block() {
  poison_shared_memory();
  barrier_epoch = 0;
  std::fill(std::begin(warp_epochs), std::end(warp_epochs), 0u);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = fibers[t];
    f.state = State::kReady;
    f.warp_epoch = 0;
    f.fake_stack = nullptr;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks + t * kStack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &fiber_main, 0);
  }
  const std::vector<unsigned> order = some_order();
  do {
    for (unsigned t : order) {
      if (fibers[t].state != State::kReady) continue;
      resume(fibers[t]);
      if (!failure.empty()) return;
    }
  } while (release_warps() || release_barrier());
  explain();
}

}  // namespace

void check_size(int64_t value, int64_t limit, const char* what) {
  if (value < 1 || value > limit) {
    throw std::runtime_error("simulator: a launch of " + std::to_string(value) + " " + what + " is an error in CUDA");
  }
}

void run(dim3 grid, dim3 block, void (*body)(const void*), const void* context) {
  const std::lock_guard<std::mutex> lock(one_launch);
  for (auto [n, limit] : {std::pair{grid.x, 0x7fffffffu}, {grid.y, 65535u}, {grid.z, 65535u}}) check_size(n, limit, "blocks");
  for (auto [n, limit] : {std::pair{block.x, 1024u}, {block.y, 1024u}, {block.z, 64u}}) check_size(n, limit, "threads");
  check_size(int64_t{block.x} * block.y * block.z, kMaxThreads, "threads");
  allocate_stacks();
  find_shared_memory();
  gridDim = grid;
  blockDim = block;
  threads = block.x * block.y * block.z;
  kernel = body;
  kernel_context = context;
  failure.clear();
  segments.clear();
  rewrites.clear();
  pages.clear();
  last_page = nullptr;
  const uint32_t blocks = grid.x * grid.y * grid.z;
  fences.assign(blocks, 0);
  for (block_number = 0; block_number < blocks; ++block_number) {
    blockIdx = {block_number % grid.x, block_number / grid.x % grid.y, block_number / grid.x / grid.y};
    run_block();
    if (!failure.empty()) {
      throw std::runtime_error("simulated kernel, block " + std::to_string(block_number) + ": " + failure);
    }
  }
}

int block_barrier(const char* what, bool predicate, Site site) {
  Fiber& self = *current;
  self.what = what;
  self.site = site;
  self.value = predicate;
  yield(State::kAtBarrier);
  return self.count;
}

Received warp_collective(const char* what, unsigned mask, uint64_t value, unsigned source, Site site) {
  Fiber& self = *current;
  self.what = what;
  self.site = site;
  self.mask = mask;
  self.value = value;
  self.source = source;
  if ((mask >> lane() & 1) == 0) fail(thread_text(number(self)) + " is not in the mask of its " + what + " at " + text(site));
  yield(State::kAtWarp);
  return self.received;
}

unsigned lane() { return number(*current) % kWarp; }
void fence() { ++fences[block_number]; }
void atomic_access(const void* address, int64_t size) {
  if (reinterpret_cast<uintptr_t>(address) % size != 0) fail("a misaligned atomic operation");
  access(address, size, true, true, __builtin_return_address(0));
}

}  // namespace sim

// What -fsanitize=thread calls.
#ifndef __SANITIZE_ADDRESS__
extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

#define HOOKS(size)                                                                                                       \
  void __tsan_read##size(void* p) { sim::access(p, size, false, false, __builtin_return_address(0)); }                    \
  void __tsan_write##size(void* p) { sim::access(p, size, true, false, __builtin_return_address(0)); }                    \
  void __tsan_unaligned_read##size(void* p) { sim::access(p, size, false, false, __builtin_return_address(0)); }          \
  void __tsan_unaligned_write##size(void* p) { sim::access(p, size, true, false, __builtin_return_address(0)); }          \
  void __tsan_volatile_read##size(void* p) { sim::access(p, size, false, false, __builtin_return_address(0)); }           \
  void __tsan_volatile_write##size(void* p) { sim::access(p, size, true, false, __builtin_return_address(0)); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_read_range(void* p, unsigned long n) { sim::access(p, n, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long n) { sim::access(p, n, true, false, __builtin_return_address(0)); }

// Atomic operations of host code, such as reference counts.
#define ATOMICS(bits, T)                                                                                                  \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }                 \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }                 \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }       \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }       \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }       \
  T __tsan_atomic##bits##_fetch_and(volatile T* p, T v, int) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }       \
  T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }         \
  T __tsan_atomic##bits##_fetch_xor(volatile T* p, T v, int) { return __atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST); }       \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* old, T v, int, int) {                               \
    return __atomic_compare_exchange_n(p, old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                             \
  }                                                                                                                       \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* old, T v, int, int) {                                 \
    return __atomic_compare_exchange_n(p, old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                             \
  }
ATOMICS(8, uint8_t) ATOMICS(16, uint16_t) ATOMICS(32, uint32_t) ATOMICS(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// What -fsanitize=alignment,bounds call; both data begin with the place in the source.
struct Place {
  const char* file;
  uint32_t line, column;
};
static std::string text(const Place* p) {
  const char* name = std::strrchr(p->file, '/');
  return std::string(name ? name + 1 : p->file) + ":" + std::to_string(p->line);
}
static void report(const std::string& what) {
  if (sim::current == nullptr) throw std::runtime_error("simulator, outside of kernels: " + what);
  sim::fail(sim::thread_text(sim::number(*sim::current)) + ": " + what);
}
void __ubsan_handle_type_mismatch_v1(const Place* at, void* p) {
  char address[32];
  std::snprintf(address, sizeof(address), "%p", p);
  report("misaligned access to " + std::string(address) + " at " + text(at));
}
void __ubsan_handle_out_of_bounds(const Place* at, uintptr_t index) {
  report("index " + std::to_string(static_cast<int64_t>(index)) + " is out of bounds at " + text(at));
}

}  // extern "C"
#endif
