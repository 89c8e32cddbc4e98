#include "fiber.h"

#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(CUDA_HOST_UCONTEXT)
// Pushes what a call preserves, exchanges stacks, pops: (where to keep this stack, the stack to go on with).
extern "C" __attribute__((visibility("hidden"))) void cuda_host_switch(void** keep, void* next);
asm(R"(
  .text
  .globl cuda_host_switch
  .hidden cuda_host_switch
  .type cuda_host_switch, @function
cuda_host_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size cuda_host_switch, .-cuda_host_switch
)");
#endif

namespace cuda_host {
namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;

Context scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;  // its bounds, which AddressSanitizer tells the first fiber that begins
size_t scheduler_stack_size = 0;
Fiber* running = nullptr;
std::vector<unsigned char*> free_stacks;

unsigned char* take_stack() {
  if (!free_stacks.empty()) {
    unsigned char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* pages = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, kind, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<unsigned char*>(pages) + kGuard;
}

void start_switch([[maybe_unused]] void** keep, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(keep, stack, size);
#endif
}

void finish_switch([[maybe_unused]] void* kept, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, stack, size);
#endif
}

void exchange(Context& keep, Context& next) {
#if defined(CUDA_HOST_UCONTEXT)
  swapcontext(&keep, &next);
#else
  cuda_host_switch(&keep, next);
#endif
}

}  // namespace

void Fiber::begin() {
  finish_switch(nullptr, &scheduler_stack, &scheduler_stack_size);
  running->entry_();
  std::abort();
}

void Fiber::resume() {
  if (!stack_) {
    stack_ = take_stack();
    fake_stack_ = nullptr;
#if defined(CUDA_HOST_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::begin, 0);
#else
    void** top = reinterpret_cast<void**>(stack_ + kStack);
    *--top = nullptr;  // where begin() would return to; it also makes the stack as aligned as a call finds it
    *--top = reinterpret_cast<void*>(&Fiber::begin);
    for (int preserved = 0; preserved < 6; ++preserved) *--top = nullptr;
    context_ = top;
#endif
  }
  running = this;
  start_switch(&scheduler_fake_stack, stack_, kStack);
  exchange(scheduler, context_);
  finish_switch(scheduler_fake_stack, nullptr, nullptr);
  if (!entry_) abandon();
}

void Fiber::suspend() { switch_to_scheduler(false); }

void Fiber::finish() {
  entry_ = nullptr;
  switch_to_scheduler(true);
  std::abort();
}

void Fiber::switch_to_scheduler(bool for_good) {
  start_switch(for_good ? nullptr : &fake_stack_, scheduler_stack, scheduler_stack_size);
  exchange(context_, scheduler);
  finish_switch(fake_stack_, nullptr, nullptr);
}

void Fiber::abandon() {
  if (!stack_) return;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStack);
#endif
  free_stacks.push_back(stack_);
  stack_ = nullptr;
}

}  // namespace cuda_host
