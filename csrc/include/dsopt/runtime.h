// Names of instruction sets, for the bindings.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "dsopt/isa.h"

namespace dsopt {

// The instruction sets this processor and its operating system can run, least first.
std::vector<std::string> isa_names();

std::string isa_name(Isa isa);

// Throws std::invalid_argument naming the accepted ones.
Isa parse_isa(const std::string& name);

// Makes `name` active; an empty name means DSOPT_ISA, or the best one where that is not set.
void set_isa(const std::string& name);

}  // namespace dsopt
