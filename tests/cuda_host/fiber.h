// Fibers: functions with stacks of their own that hand control to and fro with the one scheduler that resumes them.
//
// The switch is a few instructions of assembly on x86-64, ucontext elsewhere or with CUDA_HOST_UCONTEXT defined.
#pragma once

#if !defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)
#define CUDA_HOST_UCONTEXT
#endif

#if defined(CUDA_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_host {

#if defined(CUDA_HOST_UCONTEXT)
using Context = ucontext_t;
#else
using Context = void*;  // the stack pointer, above the registers that a call preserves
#endif

class Fiber {
 public:
  // A fiber that will call entry() when it is resumed for the first time; entry() never returns, it calls finish().
  void prepare(void (*entry)()) { entry_ = entry; }
  void resume();               // called by the scheduler; returns when the fiber suspends or finishes
  void suspend();              // called on the fiber
  [[noreturn]] void finish();  // called on the fiber; its stack goes to the next one that is resumed
  void abandon();              // called by the scheduler: as if it had finished

 private:
  static void begin();
  void switch_to_scheduler(bool for_good);

  void (*entry_)() = nullptr;
  unsigned char* stack_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  Context context_{};
};

}  // namespace cuda_host
