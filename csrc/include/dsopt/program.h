// Calls of kernels that are kept to be made again with the same addresses.
#pragma once

#include <functional>
#include <stdexcept>
#include <vector>

#include "dsopt/isa.h"

namespace dsopt {

class Program {
 public:
  // The program that keeps this thread's calls, or null.
  static Program*& recording() {
    static thread_local Program* program = nullptr;
    return program;
  }

  ~Program() {
    if (recording() == this) recording() = nullptr;
  }

  // Throws std::logic_error if this thread's calls are being kept already.
  void begin() {
    if (recording()) throw std::logic_error("this thread is recording another program");
    recording() = this;
  }
  void end() { recording() = nullptr; }

  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  void extend(const Program& other) { calls_.insert(calls_.end(), other.calls_.begin(), other.calls_.end()); }
  size_t size() const { return calls_.size(); }

  void run() const {
    for (const auto& call : calls_) call();
    trim_scratch();
  }

 private:
  std::vector<std::function<void()>> calls_;
};

}  // namespace dsopt
