// One source, several instruction sets.
//
// setup.py compiles every kernel source once per instruction set with -DDSOPT_VARIANT=<name>; all code of
// such a source lies in namespace dsopt::<name>. It must not use templates of the C++ library: the linker
// keeps one copy of those, and it could be the copy that a lesser processor cannot run.
#pragma once

#if defined(__x86_64__)
#define DSOPT_X86 1
#define DSOPT_FOR_EACH_ISA(X) X(portable) X(avx2) X(avx512) X(avx512_vbmi) X(avx512_bf16)
#else
#define DSOPT_X86 0
#define DSOPT_FOR_EACH_ISA(X) X(portable)
#endif

namespace dsopt {

#define DSOPT_NAME(isa) isa,
enum class Isa { DSOPT_FOR_EACH_ISA(DSOPT_NAME) };
#undef DSOPT_NAME

// The instruction set in use: DSOPT_ISA if set, else the best one of this processor.
// Throws std::invalid_argument for a DSOPT_ISA that is unknown or that this processor lacks.
Isa active_isa();

// Threads that the calling thread may use: OpenMP's number; one in the thread that came out of a fork, where OpenMP
// would wait for those that stayed behind.
int max_threads();

// At least `bytes` bytes aligned to 64, private to the calling thread, until its next call of this or of
// trim_scratch.
void* scratch(unsigned long bytes);

// Gives scratch memory back unless it is little enough to keep for the next call.
void trim_scratch();

}  // namespace dsopt

// Declares `kernel(const Args&)` of every instruction set, and dsopt::kernel that calls the active one. DSOPT_FP8_KERNEL:
// of a kernel that avx512_vbmi has of its own, for the byte look-ups with which FP8 is widened.
#if DSOPT_X86
#define DSOPT_KERNELS(kernel, Args, vbmi)                        \
  namespace dsopt::portable { void kernel(const Args&); }        \
  namespace dsopt::avx2 { void kernel(const Args&); }            \
  namespace dsopt::avx512 { void kernel(const Args&); }          \
  namespace dsopt::avx512_vbmi { void kernel(const Args&); }     \
  namespace dsopt::avx512_bf16 { void kernel(const Args&); }     \
  namespace dsopt {                                              \
  inline void kernel(const Args& args) {                         \
    switch (active_isa()) {                                      \
      case Isa::portable: return portable::kernel(args);         \
      case Isa::avx2: return avx2::kernel(args);                 \
      case Isa::avx512: return avx512::kernel(args);             \
      case Isa::avx512_vbmi: return vbmi::kernel(args);          \
      case Isa::avx512_bf16: return avx512_bf16::kernel(args);   \
    }                                                            \
  }                                                              \
  }
#define DSOPT_KERNEL(kernel, Args) DSOPT_KERNELS(kernel, Args, avx512)
#define DSOPT_FP8_KERNEL(kernel, Args) DSOPT_KERNELS(kernel, Args, avx512_vbmi)
#else
#define DSOPT_KERNEL(kernel, Args)                               \
  namespace dsopt::portable { void kernel(const Args&); }        \
  namespace dsopt {                                              \
  inline void kernel(const Args& args) { portable::kernel(args); } \
  }
#define DSOPT_FP8_KERNEL DSOPT_KERNEL
#endif
