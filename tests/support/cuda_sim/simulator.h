// What kernels and the scheduler that runs them on the CPU know of each other.
#pragma once

#include <cstdint>
#include <source_location>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace sim {

using Site = std::source_location;

// Runs body(context) once per thread. Throws std::runtime_error, naming the block, where the kernel breaks a rule.
void run(dim3 grid, dim3 block, void (*body)(const void*), const void* context);
void check_size(int64_t value, int64_t limit, const char* what);

// Waits for the whole block; returns for how many of its threads `predicate` held.
int block_barrier(const char* what, bool predicate, Site site);

struct Received {
  uint64_t value;    // of the source lane
  unsigned ballot;   // lanes whose value is not zero
};
// Waits for the lanes of `mask`, which all have to call the same function.
Received warp_collective(const char* what, unsigned mask, uint64_t value, unsigned source, Site site);

void atomic_access(const void* address, int64_t size);
void fence();
unsigned lane();

template <typename Body>
void run_body(const void* context) {
  (*static_cast<const Body*>(context))();
}

}  // namespace sim

template <typename Body>
void simulate_launch(dim3 grid, dim3 block, const Body& body) {
  sim::run(grid, block, &sim::run_body<Body>, &body);
}
template <typename Body>
void simulate_launch(int64_t grid, int64_t block, const Body& body) {
  sim::check_size(grid, 0x7fffffff, "blocks");
  sim::check_size(block, 1024, "threads");
  simulate_launch(dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(block)), body);
}
