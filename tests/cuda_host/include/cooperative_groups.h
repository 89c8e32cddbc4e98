// Stands in for CUDA's header of this name: the block, the cluster and the grid as groups.
#pragma once

#include "cuda_host/thread.h"

namespace cooperative_groups {

using cuda_host::Here;

struct thread_block {
  static void sync(Here here = Here::current()) { cuda_host::sync_block(0, "thread_block::sync", here); }
  static unsigned thread_rank() { return cuda_host::current->rank; }
  static unsigned num_threads() { return cuda_host::current->block->threads.size(); }
  static unsigned size() { return num_threads(); }
};
inline thread_block this_thread_block() { return {}; }

struct cluster_group {
  static void sync(Here here = Here::current()) { cuda_host::sync_cluster("cluster.sync", here); }
  struct arrival_token {};
  static arrival_token barrier_arrive(Here here = Here::current()) {
    cuda_host::arrive_at_cluster("cluster.barrier_arrive", here);
    return {};
  }
  static void barrier_wait(arrival_token&&, Here here = Here::current()) { barrier_wait(here); }
  static void barrier_wait(Here here = Here::current()) { cuda_host::wait_for_cluster("cluster.barrier_wait", here); }
  static unsigned block_rank() { return cuda_host::current->block->cluster_rank; }
  static unsigned num_blocks() { return cuda_host::current->block->cluster->blocks.size(); }
  static dim3 dim_blocks() { return cuda_host::current->block->grid->cluster_size; }
  static unsigned thread_rank() { return block_rank() * thread_block::num_threads() + thread_block::thread_rank(); }
  static unsigned num_threads() { return num_blocks() * thread_block::num_threads(); }
  // The same place in the dynamic shared memory of another block of the cluster.
  template <class T>
  static T* map_shared_rank(T* mine, unsigned rank) {
    return static_cast<T*>(cuda_host::map_shared(const_cast<void*>(static_cast<const volatile void*>(mine)), rank));
  }
};
inline cluster_group this_cluster() { return {}; }

struct grid_group {
  static void sync(Here here = Here::current()) { cuda_host::sync_grid("grid.sync", here); }
  static bool is_valid() { return cuda_host::current->block->grid->cooperative; }
  static unsigned long long block_rank() { return cuda_host::current->block->rank; }
  static unsigned long long num_blocks() {
    const dim3 size = cuda_host::current->block->grid->size;
    return 1ull * size.x * size.y * size.z;
  }
  static unsigned long long thread_rank() {
    return block_rank() * thread_block::num_threads() + thread_block::thread_rank();
  }
  static unsigned long long num_threads() { return num_blocks() * thread_block::num_threads(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
