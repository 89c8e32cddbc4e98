#include "scheduler.h"

#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>

#include <dlfcn.h>

#include "include/cuda_host/memory.h"
#include "include/cuda_host/warp.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
extern "C" void __sanitizer_symbolize_pc(void* pc, const char* format, char* text, size_t size);
#else
#define ASAN_POISON_MEMORY_REGION(begin, size)
#define ASAN_UNPOISON_MEMORY_REGION(begin, size)
#endif

// The section of the __shared__ variables, from the linker; absent if there are none.
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_cuda_shared[], __stop_cuda_shared[];

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

Thread* current = nullptr;

namespace {

constexpr int kPoison = 0xff;         // NaN in every floating format, −1 in integers
constexpr int kIdleRounds = 1 << 16;  // of spinning threads alone, after which none is waited for any longer

// ---- orders ---------------------------------------------------------------------------------------------------------

struct Order {
  enum { forward, reverse, random } kind = forward;
  std::mt19937 generator;

  // 0 … count − 1 in the order of this visit.
  void visit(std::vector<unsigned>& places, unsigned count) {
    places.resize(count);
    std::iota(places.begin(), places.end(), 0u);
    if (kind == reverse) std::reverse(places.begin(), places.end());
    if (kind == random) std::shuffle(places.begin(), places.end(), generator);
  }
};

Order order = [] {
  const char* name = std::getenv("CUDA_HOST_ORDER");
  Order initial;
  if (name && std::strcmp(name, "reverse") == 0) initial.kind = Order::reverse;
  if (name && std::strncmp(name, "random", 6) == 0) initial.kind = Order::random;
  if (name && std::strncmp(name, "random:", 7) == 0) initial.generator.seed(std::atoi(name + 7));
  return initial;
}();

// ---- static shared memory -------------------------------------------------------------------------------------------

size_t static_shared_bytes() { return __stop_cuda_shared - __start_cuda_shared; }

bool in_static_shared(const void* place) { return place >= __start_cuda_shared && place < __stop_cuda_shared; }

// Byte by byte behind AddressSanitizer's back, which has its red zones in there.
__attribute__((no_sanitize("address", "undefined"))) void copy_raw(volatile unsigned char* to,
                                                                   const volatile unsigned char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) to[i] = from[i];
}

__attribute__((no_sanitize("address", "undefined"))) void poison_static_shared() {
  volatile unsigned char* section = __start_cuda_shared;
  for (size_t i = 0, bytes = static_shared_bytes(); i < bytes; ++i) section[i] = kPoison;
}

// ---- what a defect's message says -----------------------------------------------------------------------------------

std::string site(const char* operation, const Here& here) {
  std::ostringstream text;
  const char* file = here.file_name();
  if (const char* slash = std::strrchr(file, '/')) file = slash + 1;
  text << operation << " (" << file << ":" << here.line() << ")";
  return text.str();
}

std::string name_of(const void* function) {
#if defined(__SANITIZE_ADDRESS__)
  char text[1024] = "";
  void* inside = static_cast<char*>(const_cast<void*>(function)) + 1;  // it looks at what is before a return address
  __sanitizer_symbolize_pc(inside, "%f", text, sizeof text);
  if (text[0] && text[0] != '(') return text;
#endif
  Dl_info info;
  if (!dladdr(function, &info)) return "a kernel";
  if (info.dli_sname) return info.dli_sname;
  std::ostringstream place;
  place << "kernel at +0x" << std::hex << (static_cast<const char*>(function) - static_cast<char*>(info.dli_fbase));
  return place.str();
}

std::string name_of(const Block& block) {
  std::ostringstream text;
  text << "block (" << block.index.x << ", " << block.index.y << ", " << block.index.z << ")";
  return text.str();
}

std::string describe(const Thread& thread) {
  if (thread.state == State::exited) return "exited";
  if (!thread.operation) return "not waiting";
  std::string text = "at " + site(thread.operation, thread.where);
  if (thread.state == State::in_warp) {
    std::ostringstream mask;
    mask << ", mask 0x" << std::hex << thread.mask;
    text += mask.str();
  }
  return text;
}

// Where the threads of a block are, like "  threads 0–31, 64: at __syncthreads (topk.cu:30)".
std::string describe(const Block& block) {
  std::vector<std::pair<std::string, std::string>> groups;
  for (unsigned first = 0, last; first < block.threads.size(); first = last + 1) {
    const std::string where = describe(block.threads[first]);
    for (last = first; last + 1 < block.threads.size() && describe(block.threads[last + 1]) == where;) ++last;
    auto group = std::find_if(groups.begin(), groups.end(), [&](auto& g) { return g.first == where; });
    if (group == groups.end()) group = groups.insert(group, {where, ""});
    if (group->second.size() > 60) continue;
    if (!group->second.empty()) group->second += ", ";
    group->second += std::to_string(first);
    if (last > first) group->second += "-" + std::to_string(last);
  }
  std::string text;
  for (auto& [where, threads] : groups) text += "\n  threads " + threads + ": " + where;
  return text;
}

// ---- one launch -----------------------------------------------------------------------------------------------------

const Kernel* kernel = nullptr;
std::string what_was_wrong;              // set by a thread, thrown by the scheduler
Block* in_place = nullptr;               // whose static shared memory lies in the section
std::vector<std::unique_ptr<Exchange>> exchanges;
std::vector<Exchange*> free_exchanges;

void run_thread() {
  kernel->call(kernel->arguments);
  Thread& me = *current;
  me.state = State::exited;
  me.operation = nullptr;
  Warp& warp = me.block->warps[me.rank / 32];
  warp.exited |= 1u << me.rank % 32;
  me.fiber.finish();
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("cuda_host: " + name_of(kernel->address) + ", " + what);
}

void release(Thread& thread) {
  if (thread.exchange && --thread.exchange->readers == 0) free_exchanges.push_back(thread.exchange);
  thread.exchange = nullptr;
}

// A launch's blocks in turn, or a cluster's or all of a cooperative launch's side by side: `places` at a time.
class Residents {
 public:
  Residents(Grid& grid, unsigned places) : grid_(grid), blocks_(places) {
    const dim3 size = grid.block_size;
    const unsigned count = size.x * size.y * size.z;
    for (Block& block : blocks_) {
      block.grid = &grid;
      block.size = size;
      block.threads.resize(count);
      block.warps.resize((count + 31) / 32);
      if (places > 1) block.static_shared.resize(static_shared_bytes());
      for (unsigned rank = 0; rank < count; ++rank) {
        Thread& thread = block.threads[rank];
        thread.rank = rank;
        thread.block = &block;
        thread.index = {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
      }
    }
  }

  ~Residents() {
    for (Block& block : blocks_) {
      for (Thread& thread : block.threads) {
        thread.fiber.abandon();
        release(thread);
      }
      std::free(block.shared);
    }
    current = nullptr;
    in_place = nullptr;
  }

  Block& operator[](unsigned place) { return blocks_[place]; }
  unsigned size() const { return blocks_.size(); }

  // Makes a place ready for a block. Its memory is there, but not to be touched before it starts.
  void prepare(unsigned place, uint64_t rank, Cluster* cluster) {
    Block& block = blocks_[place];
    block.rank = rank;
    block.index = {unsigned(rank % grid_.size.x), unsigned(rank / grid_.size.x % grid_.size.y),
                   unsigned(rank / (uint64_t(grid_.size.x) * grid_.size.y))};
    block.cluster = cluster;
    block.started = false;
    block.left = block.threads.size();
    block.barrier = {};
    block.barrier.expected = block.threads.size();
    if (grid_.shared_bytes && posix_memalign(reinterpret_cast<void**>(&block.shared), 128, grid_.shared_bytes) != 0)
      throw std::bad_alloc();
    ASAN_POISON_MEMORY_REGION(block.shared, grid_.shared_bytes);
    for (unsigned w = 0; w < block.warps.size(); ++w) {
      const unsigned lanes = std::min<unsigned>(block.threads.size() - 32 * w, 32);
      block.warps[w] = {lanes == 32 ? ~0u : (1u << lanes) - 1, 0, 0};
    }
    for (Thread& thread : block.threads) {
      thread.state = State::runnable;
      thread.operation = nullptr;
      thread.cluster_generation = 0;
      thread.copies.clear();
      thread.group = 0;
      thread.fiber.prepare(&run_thread);
    }
  }

  // Runs the blocks in the first `count` places to their end.
  void run(unsigned count) {
    std::vector<unsigned> visit;
    for (int idle = 0; ; ++idle) {
      bool left = false, spinning = false;
      order.visit(visit, count);
      for (unsigned place : visit) {
        Block& block = blocks_[place];
        if (block.left == 0) continue;
        put_in_place(block);
        if (run_as_far_as_possible(block)) idle = 0;
        if (block.left == 0) finish(block);
        else left = true;
        for (const Thread& thread : block.threads) spinning |= thread.state == State::spinning;
      }
      if (!left) return;
      if (idle > (spinning ? kIdleRounds : 0)) stuck(count, spinning);
    }
  }

 private:
  void put_in_place(Block& block) {
    if (in_place != &block && !block.static_shared.empty()) {
      if (in_place) copy_raw(in_place->static_shared.data(), __start_cuda_shared, static_shared_bytes());
      if (block.started) copy_raw(__start_cuda_shared, block.static_shared.data(), static_shared_bytes());
    }
    in_place = &block;
    if (block.started) return;
    block.started = true;
    poison_static_shared();
    ASAN_UNPOISON_MEMORY_REGION(block.shared, grid_.shared_bytes);
    if (block.shared) std::memset(block.shared, kPoison, grid_.shared_bytes);
  }

  void finish(Block& block) {
    if (block.shared) std::memset(block.shared, kPoison, grid_.shared_bytes);
    std::free(block.shared);
    block.shared = nullptr;
    in_place = nullptr;
  }

  static bool can_run(const Thread& thread) {
    return thread.state == State::runnable || thread.state == State::spinning ||
           (thread.state == State::at_barrier && thread.barrier->generation != thread.generation);
  }

  // Resumes each lane that can run, once. Whether one did more than spin.
  bool run_lanes(Block& block, unsigned warp) {
    bool progress = false;
    const unsigned lanes = std::min<unsigned>(block.threads.size() - 32 * warp, 32);
    order.visit(lanes_, lanes);
    for (unsigned lane : lanes_) {
      Thread& thread = block.threads[32 * warp + lane];
      if (!can_run(thread)) continue;
      thread.state = State::runnable;
      thread.operation = nullptr;
      current = &thread;
      threadIdx = thread.index;
      blockIdx = block.index;
      blockDim = block.size;
      gridDim = grid_.size;
      thread.fiber.resume();
      current = nullptr;
      if (!what_was_wrong.empty()) fail(std::exchange(what_was_wrong, {}));
      if (thread.state == State::exited) {
        --block.left;
        release(thread);
      }
      progress |= thread.state != State::spinning;
    }
    return progress;
  }

  bool run_as_far_as_possible(Block& block) {
    bool progress = false;
    for (bool again = true; again;) {
      again = false;
      order.visit(warps_, block.warps.size());
      for (unsigned warp : warps_)
        while (run_lanes(block, warp)) {
          again = progress = true;
          if (order.kind == Order::random) break;  // the warps take turns
        }
    }
    return progress;
  }

  [[noreturn]] void stuck(unsigned count, bool spinning) {
    std::string text = spinning ? "a loop waits for a write that never comes"
                                : "deadlock: threads wait for others that never come";
    unsigned told = 0;
    for (unsigned place = 0; place < count && told < 4; ++place) {
      if (count > 1 && told == 3) {
        text += "\n(and more blocks)";
        break;
      }
      text += (told++ ? "\n" : "; ") + name_of(blocks_[place]) + describe(blocks_[place]);
    }
    fail(text);
  }

  Grid& grid_;
  std::vector<Block> blocks_;
  std::vector<unsigned> warps_, lanes_;
};

void wait(State state, const char* operation, const Here& here) {
  Thread& me = *current;
  me.state = state;
  me.operation = operation;
  me.where = here;
  me.fiber.suspend();
}

void wait_for(const Barrier& barrier, unsigned generation, const char* operation, const Here& here) {
  if (barrier.generation != generation) return;
  current->barrier = &barrier;
  current->generation = generation;
  wait(State::at_barrier, operation, here);
}

// The generation that was arrived at.
unsigned arrive(Barrier& barrier, bool vote, const char* operation, const Here& here) {
  if (barrier.arrived == 0) {
    barrier.operation = operation;
    barrier.where = here;
  } else if (barrier.where.line() != here.line() || barrier.where.column() != here.column() ||
             std::strcmp(barrier.where.file_name(), here.file_name()) != 0) {
    defect("divergent barrier: this thread is at " + site(operation, here) + ", others are at " +
           site(barrier.operation, barrier.where));
  }
  const unsigned generation = barrier.generation;
  barrier.votes += vote;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    barrier.last_votes = std::exchange(barrier.votes, 0);
    ++barrier.generation;
  }
  return generation;
}

// Once all lanes of the mask have come: their values, for each of them to read.
bool complete(Block& block, unsigned warp_index, unsigned mask) {
  Warp& warp = block.warps[warp_index];
  if ((warp.waiting & mask) != mask) return false;
  Thread* lanes = &block.threads[32 * warp_index];
  const Thread& me = *current;
  for (unsigned left = mask; left; left &= left - 1)
    if (lanes[__builtin_ctz(left)].mask != mask) return false;
  for (unsigned left = mask; left; left &= left - 1) {
    const Thread& other = lanes[__builtin_ctz(left)];
    if (std::strcmp(other.operation, me.operation) != 0 || other.size != me.size)
      defect("lanes of one mask are at different warp operations: " + describe(me) + "; " + describe(other));
  }
  if (free_exchanges.empty()) free_exchanges.push_back(exchanges.emplace_back(new Exchange).get());
  Exchange* all = free_exchanges.back();
  free_exchanges.pop_back();
  if (mask != ~0u) std::memset(all->values, kPoison, 32 * me.size);
  all->readers = __builtin_popcount(mask);
  for (unsigned left = mask; left; left &= left - 1) {
    Thread& lane = lanes[__builtin_ctz(left)];
    std::memcpy(all->values + me.size * __builtin_ctz(left), lane.value, me.size);
    lane.exchange = all;
    lane.state = State::runnable;
  }
  warp.waiting &= ~mask;
  return true;
}

}  // namespace

// ---- what threads call ----------------------------------------------------------------------------------------------

void defect(const std::string& what) {
  const uint3 t = current->index;
  std::ostringstream text;
  text << name_of(*current->block) << ", thread (" << t.x << ", " << t.y << ", " << t.z << "): " << what;
  what_was_wrong = text.str();
  current->fiber.finish();
}

void spin() { wait(State::spinning, "a loop that waits for a write", Here{}); }

unsigned sync_block(bool vote, const char* operation, Here here) {
  Barrier& barrier = current->block->barrier;
  wait_for(barrier, arrive(barrier, vote, operation, here), operation, here);
  return barrier.last_votes;
}

void sync_cluster(const char* operation, Here here) {
  arrive_at_cluster(operation, here);
  wait_for_cluster(operation, here);
}

void arrive_at_cluster(const char* operation, Here here) {
  current->cluster_generation = arrive(current->block->cluster->barrier, false, operation, here);
}

void wait_for_cluster(const char* operation, Here here) {
  wait_for(current->block->cluster->barrier, current->cluster_generation, operation, here);
}

void sync_grid(const char* operation, Here here) {
  Grid& grid = *current->block->grid;
  if (!grid.cooperative) defect(site(operation, here) + " in a launch that is not cooperative");
  wait_for(grid.barrier, arrive(grid.barrier, false, operation, here), operation, here);
}

void* map_shared(void* mine, unsigned rank) {
  const Block& block = *current->block;
  const std::vector<Block*>& blocks = block.cluster->blocks;
  auto* place = static_cast<unsigned char*>(mine);
  if (rank >= blocks.size()) defect("map_shared_rank: no such block in the cluster");
  if (place < block.shared || place > block.shared + block.grid->shared_bytes)
    defect("map_shared_rank: the address is not in the block's dynamic shared memory");
  if (!blocks[rank]->shared) defect("map_shared_rank: block " + std::to_string(rank) + " of the cluster has exited");
  return blocks[rank]->shared + (place - block.shared);
}

const void* exchange(unsigned mask, const void* mine, unsigned size, const char* operation, Here here) {
  Thread& me = *current;
  Block& block = *me.block;
  const unsigned warp_index = me.rank / 32, bit = 1u << me.rank % 32;
  Warp& warp = block.warps[warp_index];
  if (!(mask & bit)) defect(site(operation, here) + ": the mask does not name the lane that calls");
  mask &= warp.lanes;
  if (mask & warp.exited) defect(site(operation, here) + ": the mask names lanes that have exited");
  release(me);
  std::memcpy(me.value, mine, size);
  me.mask = mask;
  me.size = size;
  me.operation = operation;
  me.where = here;
  me.state = State::in_warp;
  warp.waiting |= bit;
  if (!complete(block, warp_index, mask)) me.fiber.suspend();
  return me.exchange->values;
}

void copy_async(void* shared, const void* global, int bytes, bool inside) {
  Thread& me = *current;
  auto* to = static_cast<unsigned char*>(shared);
  const Block& block = *me.block;
  if (uintptr_t(shared) % bytes || uintptr_t(global) % bytes)
    defect("copy_async: an address is not aligned to the copy's size");
  if (!in_static_shared(to) && !(to >= block.shared && to < block.shared + block.grid->shared_bytes))
    defect("copy_async: the destination is not in the block's shared memory");
  Copy copy{shared, {}, bytes, me.group};
  if (inside) std::memcpy(copy.bytes, global, bytes);
  std::memset(shared, kPoison, bytes);
  me.copies.push_back(copy);
}

void commit_copies() { ++current->group; }

void wait_copies(unsigned pending) {
  Thread& me = *current;
  const auto done = std::find_if(me.copies.begin(), me.copies.end(),
                                 [&](const Copy& copy) { return copy.group + pending >= me.group; });
  for (auto copy = me.copies.begin(); copy != done; ++copy) std::memcpy(copy->shared, copy->bytes, copy->size);
  me.copies.erase(me.copies.begin(), done);
}

// ---- what a launch calls --------------------------------------------------------------------------------------------

bool set_order(const char* name) {
  Order next;
  if (std::strcmp(name, "reverse") == 0) next.kind = Order::reverse;
  else if (std::strncmp(name, "random:", 7) == 0) {
    next.kind = Order::random;
    next.generator.seed(std::strtoul(name + 7, nullptr, 10));
  } else if (std::strcmp(name, "forward") != 0) return false;
  order = next;
  return true;
}

void run(Grid& grid, const Kernel& what) {
  kernel = &what;
  what_was_wrong.clear();
  const dim3 cluster = grid.cluster_size;
  const unsigned together = cluster.x * cluster.y * cluster.z;
  const uint64_t blocks = uint64_t(grid.size.x) * grid.size.y * grid.size.z;
  const uint64_t clusters = blocks / together;
  const unsigned at_once = grid.cooperative ? clusters : 1;  // clusters that are resident
  const unsigned threads = grid.block_size.x * grid.block_size.y * grid.block_size.z;
  grid.barrier.expected = grid.cooperative ? threads * blocks : 0;
  Residents residents(grid, at_once * together);
  std::vector<Cluster> resident_clusters(at_once);
  std::vector<unsigned> first;
  order.visit(first, clusters);
  for (uint64_t done = 0; done < clusters; done += at_once) {
    for (unsigned c = 0; c < at_once; ++c) {
      Cluster& one = resident_clusters[c];
      one.blocks.clear();
      one.barrier = {};
      one.barrier.expected = threads * together;
      const uint64_t id = grid.cooperative ? c : first[done];
      const dim3 in_grid(grid.size.x / cluster.x, grid.size.y / cluster.y, grid.size.z / cluster.z);
      const dim3 corner(id % in_grid.x * cluster.x, id / in_grid.x % in_grid.y * cluster.y,
                        id / (uint64_t(in_grid.x) * in_grid.y) * cluster.z);
      for (unsigned r = 0; r < together; ++r) {
        const unsigned x = corner.x + r % cluster.x, y = corner.y + r / cluster.x % cluster.y,
                       z = corner.z + r / (cluster.x * cluster.y);
        residents.prepare(c * together + r, x + uint64_t(grid.size.x) * (y + uint64_t(grid.size.y) * z), &one);
        residents[c * together + r].cluster_rank = r;
        one.blocks.push_back(&residents[c * together + r]);
      }
    }
    residents.run(at_once * together);
  }
}

}  // namespace cuda_host
