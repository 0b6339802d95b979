// What is compiled once for all instruction sets: the choice among them, threads, and scratch memory.
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "dsopt/runtime.h"

#if DSOPT_X86
#include <cpuid.h>
#endif

namespace dsopt {
namespace {

constexpr int kUnset = -1;
std::atomic<int> active{kUnset};

#define DSOPT_NAME(isa) #isa,
constexpr const char* kNames[] = {DSOPT_FOR_EACH_ISA(DSOPT_NAME)};
#undef DSOPT_NAME

#if DSOPT_X86
// not every compiler's __builtin_cpu_supports knows it by name
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// asks for what the operating system saves too, not only for what the processor has
bool has(Isa isa) {
#if DSOPT_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_vbmi: return avx512 && __builtin_cpu_supports("avx512vbmi");
    // Cooper Lake has the one and not the other
    case Isa::avx512_bf16: return has(Isa::avx512_vbmi) && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::portable;
}

Isa choose(const std::string& wanted) {
  const std::vector<std::string> names = isa_names();
  if (wanted.empty()) return parse_isa(names.back());
  return parse_isa(wanted);
}

// A thread's OpenMP team does not follow it through a fork. Threads that the child starts get teams of their own.
thread_local bool forked = false;
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

constexpr unsigned long kKeptScratch = 32ul << 20;

struct Buffer {
  void* data = nullptr;
  unsigned long bytes = 0;

  void release() {
    std::free(data);
    data = nullptr;
    bytes = 0;
  }
  ~Buffer() { release(); }
};

thread_local Buffer buffer;

}  // namespace

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (has(static_cast<Isa>(i))) names.push_back(kNames[i]);
  }
  return names;
}

Isa parse_isa(const std::string& name) {
  std::string accepted;
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (!has(static_cast<Isa>(i))) continue;
    if (name == kNames[i]) return static_cast<Isa>(i);
    accepted += accepted.empty() ? kNames[i] : std::string(", ") + kNames[i];
  }
  throw std::invalid_argument("DSOPT_ISA=" + name + " is not available here; this processor has: " + accepted);
}

std::string isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

void set_isa(const std::string& name) {
  const char* wanted = name.empty() ? std::getenv("DSOPT_ISA") : name.c_str();
  try {
    // stored once: kernels may be running
    active = static_cast<int>(choose(wanted ? wanted : ""));
  } catch (...) {
    active = kUnset;
    throw;
  }
}

Isa active_isa() {
  const int isa = active;
  if (isa != kUnset) return static_cast<Isa>(isa);
  set_isa("");
  return static_cast<Isa>(active.load());
}

int max_threads() {
#ifdef _OPENMP
  return forked ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

void* scratch(unsigned long bytes) {
  if (bytes > buffer.bytes) {
    buffer.release();
    const unsigned long rounded = (bytes + bytes / 4 + 63) / 64 * 64;
    buffer.data = std::aligned_alloc(64, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

void trim_scratch() {
  if (buffer.bytes > kKeptScratch) buffer.release();
}

}  // namespace dsopt
