// What a running kernel is made of: threads, warps, blocks, clusters, the grid; and how they wait for each other.
//
// The order in which threads run between their waits is chosen with cuda_host_order (or CUDA_HOST_ORDER at the start):
// "forward", each warp as far as it gets before the next, lanes and blocks in ascending order; "reverse", the same,
// descending; "random:<seed>", warps, lanes and blocks shuffled anew whenever they are visited.
#pragma once

#include <source_location>
#include <string>
#include <vector>

#include "../../fiber.h"
#include "types.h"

inline constexpr int warpSize = 32;

namespace cuda_host {

using Here = std::source_location;

struct Block;
struct Grid;

// Threads arrive and wait until all have; then its generation changes.
struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  unsigned votes = 0, last_votes = 0;  // arrivals with a predicate that holds: in this generation, in the last
  const char* operation = nullptr;     // of the first to arrive
  Here where{};
};

struct Copy {
  void* shared;
  unsigned char bytes[16];
  int size;
  unsigned group;
};

// What a warp operation gathered: the values of all its lanes. It lives until each of them comes to its next one.
struct Exchange {
  alignas(64) unsigned char values[32 * 64];
  unsigned readers = 0;
};

enum class State { runnable, spinning, at_barrier, in_warp, exited };

struct Thread {
  uint3 index{};
  unsigned rank = 0;
  Block* block = nullptr;
  Fiber fiber;
  State state = State::exited;
  const char* operation = nullptr;  // that it is waiting in, and where that stands in the source
  Here where{};
  const Barrier* barrier = nullptr;
  unsigned generation = 0, cluster_generation = 0;
  unsigned mask = 0;  // of the warp operation
  unsigned size = 0;  // of its value
  alignas(64) unsigned char value[64];
  Exchange* exchange = nullptr;
  std::vector<Copy> copies;
  unsigned group = 0;  // of the next copy
};

struct Warp {
  unsigned lanes = 0, waiting = 0, exited = 0;
};

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};

struct Block {
  uint3 index{};
  dim3 size;
  uint64_t rank = 0;
  Grid* grid = nullptr;
  Cluster* cluster = nullptr;
  unsigned cluster_rank = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  unsigned left = 0;  // threads that have not exited
  bool started = false;
  unsigned char* shared = nullptr;            // dynamic shared memory
  std::vector<unsigned char> static_shared;   // while another block's is in place
};

struct Grid {
  dim3 size, block_size, cluster_size;
  size_t shared_bytes = 0;
  bool cooperative = false;
  Barrier barrier;
};

extern Thread* current;  // the one that runs

[[noreturn]] void defect(const std::string& what);  // ends the launch: it throws std::runtime_error
void spin();                                        // lets all others run, as a loop that waits for a write must
unsigned sync_block(bool vote, const char* operation, Here here);  // the number of threads that voted yes
void sync_cluster(const char* operation, Here here);
void arrive_at_cluster(const char* operation, Here here);
void wait_for_cluster(const char* operation, Here here);
void sync_grid(const char* operation, Here here);
void* map_shared(void* mine, unsigned rank);

inline unsigned char* dynamic_shared() { return current->block->shared; }

}  // namespace cuda_host

// Of the thread that runs; the scheduler sets them when it resumes one.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads(cuda_host::Here here = cuda_host::Here::current()) {
  cuda_host::sync_block(false, "__syncthreads", here);
}
inline int __syncthreads_count(int predicate, cuda_host::Here here = cuda_host::Here::current()) {
  return cuda_host::sync_block(predicate, "__syncthreads_count", here);
}
inline int __syncthreads_or(int predicate, cuda_host::Here here = cuda_host::Here::current()) {
  return cuda_host::sync_block(predicate, "__syncthreads_or", here) != 0;
}
inline int __syncthreads_and(int predicate, cuda_host::Here here = cuda_host::Here::current()) {
  return cuda_host::sync_block(predicate, "__syncthreads_and", here) == cuda_host::current->block->threads.size();
}
inline void __nanosleep(unsigned) { cuda_host::spin(); }
