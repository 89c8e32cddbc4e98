// Stands in for CUDA's header of this name: a .cu file compiled with g++ against it runs on the CPU.
//
// Every thread of a block is a fiber, and everything runs on the OS thread that launched: a run is a function of its
// inputs and of the thread order (see cuda_host/thread.h), so whatever goes wrong goes wrong again. Blocks run one
// after the other, in any order; those of a cluster or of a cooperative launch run side by side.
//
// What is caught, by the sanitizers: overruns of global, dynamic shared, static shared and local memory, misaligned
// vector accesses, overflows, shifts. By the scheduler, at once or when nothing can go on: barriers that not every
// thread reaches or that threads reach in different places, warp operations that a named lane never joins or has left,
// another block's shared memory used before it starts or after it exits, launches that a device would refuse. By the
// results: memory that nothing wrote is NaN; a missing barrier or a missing wait for a copy gives other sums in some
// thread order.
//
// What is not: the memory model (every write is seen at once and in order: a missing fence goes unnoticed), data races
// that no order of whole threads between their waits shows, lanes that diverge and rely on meeting again, bank
// conflicts, coalescing, registers, occupancy that registers limit, time. Arithmetic is the host's: no contraction to
// fma, exact exponentials.
//
// Two rules for kernels: `__shared__` variables live in functions of an anonymous namespace (elsewhere g++ forgets
// their section), and a loop that waits for another thread's write calls cuda_host::spin() in its body.
#pragma once

#include "cuda_host/types.h"
#include "cuda_host/thread.h"

#include "cuda_host/launch.h"
#include "cuda_host/math.h"
#include "cuda_host/memory.h"
#include "cuda_host/warp.h"
